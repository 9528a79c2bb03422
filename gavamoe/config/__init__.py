"""Every setting with its bounds; YAML, presets, `--set`.

schema     the settings, section by section, with meaning, unit and bound of each
files      YAML in and out, presets, overrides, errors in one line
reference  the page of all settings, docs/config.md
"""
