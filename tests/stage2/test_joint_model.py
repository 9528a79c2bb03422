"""The joint loss (Eq. 13): what each part weighs, which parameters it reaches, what is decayed."""

from pathlib import Path

import pytest
import torch
from helpers.stage2_runs import close, joint_batch
from helpers.tiny import tiny
from torch import Tensor

from gavamoe.stage2.joint_model import JointModel, parameter_groups
from gavamoe.stage2.schedule import PEAK
from gavamoe.stage2.setup import Setup, prepare
from gavamoe.stage2.training_engines import make_engine

pytestmark = pytest.mark.usefixtures("extensions_dir")


@pytest.fixture
def setup(tiny_dataset: Path, stage1: Path) -> Setup:
    return prepare(tiny(), tiny_dataset, stage1)


def gradients(setup: Setup, alpha: float, *, text: bool = True, pairs: bool = True) -> dict[str, Tensor | None]:
    """Gradients of the joint loss at `alpha`, by name; the same random numbers at every call."""
    model = JointModel(setup.model.explainer, setup.model.vae_gmm, alpha).train()
    model.zero_grad(set_to_none=True)
    stage1_names = ("users", "items", "ratings")
    batch = {name: t for name, t in joint_batch(setup).items() if (pairs if name in stage1_names else text)}
    torch.manual_seed(0)
    model(**batch)["loss"].backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_shared_tables_get_both_gradients(setup: Setup) -> None:
    both = gradients(setup, 0.3)
    text, pairs = gradients(setup, 0.3, pairs=False), gradients(setup, 0.3, text=False)
    for table in ("explainer.user_embedding.weight", "explainer.item_embedding.weight"):
        parts = [part[table] for part in (text, pairs)]
        assert parts[0] is not None
        assert parts[1] is not None
        assert min(part.abs().max() for part in parts if part is not None) > 1e-8
        torch.testing.assert_close(both[table], parts[0] + parts[1])
    assert text["vae_gmm.encoder.mean.weight"] is None
    assert both["vae_gmm.encoder.mean.weight"] is not None


def test_a_tied_table_gets_what_its_lookups_and_its_output_head_give(setup: Setup) -> None:
    model = JointModel(setup.model.explainer, setup.model.vae_gmm, alpha=0).train()
    table = model.explainer.get_input_embeddings()
    assert table.sparse  # no dense gradient of its own for the lookups
    found = []
    for table.sparse in (True, False):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        model(**joint_batch(setup))["loss"].backward()
        found.append(table.weight.grad)
    assert found[0] is not None
    assert found[0].layout == torch.strided
    torch.testing.assert_close(found[0], found[1])


def test_the_loss_weighs_both_parts(setup: Setup) -> None:
    def loss(alpha: float) -> dict[str, float]:
        torch.manual_seed(0)
        model = JointModel(setup.model.explainer, setup.model.vae_gmm, alpha).train()
        return {name: float(value.detach()) for name, value in model(**joint_batch(setup)).items()}

    half = loss(0.25)
    assert half["loss"] == pytest.approx(0.25 * half["elbo_loss"] + 0.75 * half["explanation_loss"], rel=1e-5)
    assert set(loss(0.0)) == {"loss", "explanation_loss"}
    assert set(loss(1.0)) == {"loss", "elbo_loss", "reconstruction", "kl"}


def own(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    shared = ("user_embedding", "item_embedding")
    return {n: t for n, t in state.items() if n.startswith(prefix) and not n.removeprefix(prefix).startswith(shared)}


@pytest.mark.parametrize(("alpha", "idle"), [(0, "vae_gmm."), (1, "explainer.")])
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_loss_without_weight_leaves_its_own_parameters_untouched(
    alpha: float, idle: str, engine: str, tiny_dataset: Path, stage1: Path
) -> None:
    config = tiny(f"stage2.alpha={alpha}", "stage2.weight_decay=0.5", f"runtime.engine={engine}")
    setup = prepare(config, tiny_dataset, stage1)
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    running = make_engine(engine, setup.model, config.stage2, world_size=1, device="cpu")
    try:
        for _ in range(3):
            running.train_step([joint_batch(setup)], PEAK)
        after = running.state_dict()
    finally:
        running.close()
    close(own(after, idle), own(before, idle), 0.0)
    busy = "explainer." if idle == "vae_gmm." else "vae_gmm."
    moved = [name for name, tensor in own(before, busy).items() if not torch.equal(tensor, after[name])]
    assert len(moved) > 0.8 * len(own(before, busy))
    for table in ("explainer.user_embedding.weight", "vae_gmm.item_embedding.weight"):
        assert not torch.equal(before[table], after[table])


def test_decay_spares_norms_biases_tables_and_the_mixture(setup: Setup) -> None:
    names = {id(parameter): name for name, parameter in setup.model.named_parameters() if parameter.requires_grad}
    assert not any(name.endswith(("user_bias", "item_bias")) for name in names.values())
    groups = parameter_groups(setup.model, tiny("stage2.weight_decay=0.5").stage2)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | spared == set(names.values())
    assert not decayed & spared
    assert {"explainer.model.layers.0.self_attn.q_proj.weight", "vae_gmm.encoder.mean.weight"} <= decayed
    assert {"explainer.model.layers.0.mlp.experts.down_proj", "explainer.model.layers.0.mlp.router.weight"} <= decayed
    assert {"explainer.model.norm.weight", "explainer.model.embed_tokens.weight", "vae_gmm.prior.means"} <= spared
    slow = {names[id(p)] for group in groups if group["lr"] == 1e-3 for p in group["params"]}
    assert slow == {n for n in names.values() if n.startswith("vae_gmm.") or "user_emb" in n or "item_emb" in n}


def test_experts_and_gates_may_have_a_rate_of_their_own(setup: Setup) -> None:
    names = {id(parameter): name for name, parameter in setup.model.named_parameters()}
    groups = parameter_groups(setup.model, tiny("stage2.expert_learning_rate=0.5").stage2)
    fast = {names[id(p)] for group in groups if group["lr"] == group["peak_lr"] == 0.5 for p in group["params"]}
    assert fast == {n for n in names.values() if ".mlp.experts." in n or ".mlp.router." in n}
    assert fast
