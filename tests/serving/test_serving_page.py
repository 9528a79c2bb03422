"""Over a real connection: the page at / in a browser (headless Chromium), and clients that go away."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from helpers.browser import CHROMIUM, Page, chromium
from helpers.serve_run import Site

from gavamoe.data.bounds import MAX_ID_CHARS
from gavamoe.serving.settings import hash_key

pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

IDLE = "document.querySelector('.card') && !document.querySelector('.busy')"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    opened = Site()
    yield opened
    opened.close()


def browse(visit: Callable[[Page], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with chromium() as page:
            await page.look(1200)
            return await visit(page)

    return asyncio.run(run())


@needs_browser
def test_an_explanation_is_shown_whole(site: Site) -> None:
    async def visit(page: Page) -> None:
        await page.open(f"{site.url}/?user=U000001&item=I000001")
        await page.until(IDLE)
        assert len(await page.run("document.querySelector('.text').textContent")) > 0
        assert await page.run("document.querySelectorAll('.bar').length") == 3
        assert await page.run("document.querySelectorAll('.bar.chosen').length") == 1
        shares = await page.run(
            "[...document.querySelectorAll('.bar i b')].map(b => b.getBoundingClientRect().width > 0)"
        )
        assert any(shares), "the content policy lets the bars have their width"
        assert await page.run("document.querySelectorAll('.heat tr').length") == 2
        badges = await page.run("[...document.querySelectorAll('.badge')].map(b => b.textContent).join('|')")
        assert "(predicted" in badges
        assert "(likely)" in badges
        assert not [line for line in page.complaints if "Content Security Policy" in line or "exception" in line]

    browse(visit)


@needs_browser
def test_by_keyboard_alone_and_two_users_side_by_side(site: Site) -> None:
    async def visit(page: Page) -> None:
        await page.open(site.url)
        for text in ("U000001", "I000002", "nobody"):
            await page.key("Tab")
            await page.type(text)
        await page.key("Enter", "\r")
        await page.until(f"document.querySelectorAll('.card').length === 2 && {IDLE}")
        titles = await page.run("[...document.querySelectorAll('.card h2')].map(h => h.textContent)")
        assert titles[0].startswith("U000001 → ")
        assert titles[1].startswith("nobody → ")
        tops = await page.run("[...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().top)")
        assert tops[0] == tops[1]
        assert await page.run("document.querySelectorAll('.badge.warn').length") >= 1
        assert "other=nobody" in await page.run("location.search")

    browse(visit)


@needs_browser
def test_somebody_who_is_not_in_the_data_tells_a_history(site: Site, tmp_path: Path) -> None:
    async def visit(page: Page) -> None:
        await page.open(site.url)
        await page.run("document.getElementById('stranger').open = true")
        await page.run("document.getElementById('history').focus()")
        await page.type("I000003 | 5 | Wow, really awesome dragons, no kidding!\n | 4\n\nI000004")
        await page.run("document.getElementById('item').value = 'I000001'")
        await page.run("document.getElementById('go').click()")
        await page.until(IDLE)
        assert (await page.run("document.querySelector('.card h2').textContent")).startswith("You → ")
        badges = await page.run("[...document.querySelectorAll('.badge')].map(b => b.textContent).join('|')")
        assert "routed by what you told: 3" in badges
        assert len(await page.run("document.querySelector('.text').textContent")) > 0
        assert "I000003" not in await page.run("location.search"), "what was told is in no address"
        await page.picture(tmp_path / "stranger.png")
        await page.run("document.getElementById('best').click()")
        await page.until(f"{IDLE} && document.querySelectorAll('ol button').length === 5")
        assert not [line for line in page.complaints if "exception" in line]

    browse(visit)


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_overflows(site: Site, dark: bool) -> None:
    async def visit(page: Page) -> None:
        await page.look(390, dark=dark)
        await page.open(f"{site.url}/?user={'x' * 150}&item=I000002&other=U000003")
        await page.until(IDLE)
        assert await page.run("document.documentElement.scrollWidth") == 390
        heights = await page.run("[...document.querySelectorAll('form input, form button')].map(b => b.offsetHeight)")
        assert min(height for height in heights if height) >= 44, "large enough for a finger"
        luminance = await page.run("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
        assert (luminance < 100) is dark

    browse(visit)


@needs_browser
def test_recommendations_lead_to_explanations(site: Site) -> None:
    async def visit(page: Page) -> None:
        await page.open(site.url)
        await page.key("Tab")
        await page.type("U000004")
        await page.run("document.getElementById('best').click()")
        await page.until("document.querySelectorAll('ol li').length === 5")
        await page.run("document.querySelector('ol button').click()")
        await page.until(f"document.querySelector('.heat') && {IDLE}")

    browse(visit)


@needs_browser
def test_suggestions_are_found(site: Site) -> None:
    async def visit(page: Page) -> None:
        await page.open(site.url)
        await page.run("document.getElementById('item').focus()")
        await page.type("copper")
        labels = "[...document.querySelectorAll('#items option')].map(o => o.label)"
        await page.until(f"{labels}.length > 0 && {labels}.every(label => label.includes('Copper'))")

    browse(visit)


@needs_browser
def test_states_of_error(site: Site, tmp_path: Path) -> None:
    async def visit(page: Page) -> None:
        await page.open(f"{site.url}/?user=U000001&item={'x' * 257}")
        await page.until(IDLE)
        assert "at most 256 characters" in await page.run("document.querySelector('[role=alert]').textContent")
        await page.open(site.url)
        assert await page.run("document.getElementById('user').maxLength") == MAX_ID_CHARS
        await page.run("window.fetch = () => Promise.reject(new TypeError('gone'))")
        await page.run("document.getElementById('user').value = 'U1'; document.getElementById('item').value = 'I1'")
        await page.run("document.getElementById('go').click()")
        await page.until(IDLE)
        assert "does not answer" in await page.run("document.querySelector('[role=alert]').textContent")
        broken = json.dumps('event: token\ndata: {"text": "Half a", "tokens": 2}\n\n')
        await page.run(f"window.fetch = () => Promise.resolve(new Response({broken}))")
        await page.run("document.getElementById('go').click()")
        await page.until("document.querySelector('[role=alert]')?.textContent.includes('connection was lost')")
        assert await page.run("document.querySelector('.text').textContent") == "Half a"

    browse(visit)


@needs_browser
def test_a_key_is_asked_for() -> None:
    locked = Site(api_key_hashes=[hash_key("sesame")])

    async def visit(page: Page) -> None:
        await page.open(f"{locked.url}/?user=U000001&item=I000001")
        await page.until("!document.getElementById('keyrow').hidden")
        await page.until(IDLE)
        await page.run("document.getElementById('key').value = 'sesame'")
        await page.run("document.getElementById('go').click()")
        await page.until(f"document.querySelector('.heat') && {IDLE}")

    try:
        browse(visit)
    finally:
        locked.close()


def test_a_client_that_goes_away_frees_its_row(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = site.backend.writer.engine
    step = engine._engine.step

    def slowly() -> Any:
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(engine._engine, "step", slowly)
    body = {"user": "U000001", "item": "I000001", "temperature": 5.0, "max_new_tokens": 128}

    async def go_away(path: str, more: dict[str, Any]) -> float:
        """Seconds after which nothing is written any more, once the client has gone."""
        url = site.url + path
        async with aiohttp.ClientSession() as session, session.post(url, json=body | more) as response:
            await response.content.readline()
            assert sum(engine.load) == 1
        left = time.monotonic()
        while engine.load != (0, 0):
            await asyncio.sleep(0.02)
        return time.monotonic() - left

    assert asyncio.run(go_away("/v1/explain", {"stream": True})) < 2, "the whole text takes more than 6 s"
