"""Every config builds for every argument, names only known fields, and has its command on top."""

import importlib.util
from pathlib import Path

import pytest

from vixml_jax import config as config_lib
from vixml_jax import config_rules
from vixml_jax.errors import UserError

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "tables")


def module_of(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("arg", ["", "smoke", "images=3", "images=3,smoke=True"])
def test_it_builds_and_is_valid(path, arg):
    module = module_of(path)
    if "images" in arg and "images" not in module.__doc__:
        with pytest.raises(UserError, match="unknown config argument 'images'"):
            module.get_config(arg)
        return
    config = module.get_config(arg)
    config.dataset.dir = config.dataset.dir or "data"
    config_rules.validate(config)
    base = config_lib.base()
    assert sorted(config.keys()) == sorted(base.keys())
    for section in base.keys():  # noqa: SIM118 - a ConfigDict
        assert sorted(config[section].keys()) == sorted(base[section].keys()), section
    assert f"configs/{path.name}" in module.__doc__
    if "images=3" in arg:
        assert config.vision.images == (1 if "smoke" in arg else 3)


def test_a_saved_config_is_read_back(tmp_path):
    config = module_of(CONFIGS[0]).get_config()
    config_lib.save(config, tmp_path / "config.json")
    assert config_lib.load(tmp_path / "config.json").to_json() == config.to_json()


@pytest.mark.parametrize(
    ("arg", "message"),
    [("pictures=3", "known are images"), ("images=many", "not a int"), ("smoke=perhaps", "not a bool")],
)
def test_a_wrong_argument_is_named(arg, message):
    with pytest.raises(UserError, match=message):
        module_of(CONFIGS[0]).get_config(arg)


@pytest.mark.parametrize("name", ["picto_tags", "tate_subjects"])
def test_the_open_sets_take_the_papers_losses(name):
    module = module_of(FOLDER / f"{name}.py")
    assert module.get_config().loss.name == "decoupled_softmax"
    config = module.get_config("loss=ngame")
    assert (config.loss.name, config.prototype.kind, config.loss.margin_min) == ("triplet", "none", 0.3)
    config_rules.validate(config)
    with pytest.raises(UserError, match="'hinge'"):
        module.get_config("loss=hinge")


def test_a_smoke_test_of_no_epochs_stays_one():
    module = module_of(FOLDER / "lf_amazontitles_131k.py")
    assert module.get_config("epochs=0,smoke").train.epochs == 0
    assert module.get_config("smoke").train.epochs == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("augment", 0.2, r"augment=0\.2 with config\.vision\.train='none'; a frozen tower"),
        *((name, 1.0, rf"{name}=1\.0; give a share") for name in ("augment", "drop_images", "drop_text")),
        *((name, -0.5, rf"{name}=-0\.5; give a share") for name in ("augment", "drop_images", "drop_text")),
    ],
)
def test_a_share_is_one_and_is_of_use(name, value, message):
    config = module_of(FOLDER / "picto_tags.py").get_config("images=3")
    config.vision.train = "none" if value == 0.2 else "full"
    config.vision[name] = value
    with pytest.raises(UserError, match=message):
        config_rules.validate(config)
    config.vision.train, config.vision[name] = "full", 0.2
    config_rules.validate(config)


@pytest.mark.parametrize("modalities", [(), ("sound",), ("text", 3)])
def test_modalities_are_of_those_there_are(modalities):
    config = module_of(FOLDER / "picto_tags.py").get_config("images=3")
    config.retrieval.modalities = modalities
    with pytest.raises(UserError, match=r"config\.retrieval\.modalities=.*; give"):
        config_rules.validate(config)
