# SPDX-License-Identifier: Apache-2.0
"""The configurations as text: no typo, no contradiction, no name that does not exist."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
from monai.bundle import ConfigComponent, ConfigParser

from bundle_runs import CONFIGS, TINY_NETWORK, config_files, tiny_set, training_paths, workflow
from conftest import ROOT
from scripts.datalists import make_datalist

CONFIG = {path.stem: json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))}
SETTINGS = ("metadata", "mlflow")  # no workflows
WORKFLOWS = [name for name in CONFIG if name not in SETTINGS]
BASES = ("train", "inference")
OVERLAYS = [name for name in WORKFLOWS if name not in BASES]
DATASETS = [name for name in OVERLAYS if name.startswith("dataset_")]
ADDED = {  # what an overlay brings in on purpose
    "evaluate": {"section", "val_fraction", "group_pattern", "partial_truth", "key_metric"},
    "multi_gpu_train": {"validate#sampler", "validate#dataloader#sampler", "finalize"},
    "multi_gpu_evaluate": {"sampler", "dataloader#sampler", "initialize", "finalize"},
}
BELOW = {  # what an overlay is laid over
    "evaluate": ["inference"],
    "multi_gpu_train": ["train"],
    "multi_gpu_evaluate": ["inference", "evaluate"],
}
DIFFERENT = {"_desc_", "amp", "run"}  # of train.json and inference.json; all else in both is equal
METADATA = CONFIG["metadata"]


def nodes(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every part of a configuration with its id."""
    yield path, content
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, part in parts:
        yield from nodes(part, f"{path}#{key}".lstrip("#"))


def components(content: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(path, part) for path, part in nodes(content) if isinstance(part, dict) and "_target_" in part]


def target(component: dict[str, Any]) -> Any:
    """The class or function that a component names."""
    return locate(ConfigComponent(component).resolve_module_name())


def arguments(component: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in component.items() if not re.fullmatch("_.*_", key)}


def merged(*names: str) -> dict[str, Any]:
    return ConfigParser.load_config_files(config_files(*names))


def find(content: Any, path: str) -> Any:
    """The part with this id; KeyError where there is none."""
    for key in path.split("#"):
        content = content[int(key) if isinstance(content, list) else key]
    return content


def is_known(path: str, base: dict[str, Any]) -> bool:
    """Whether the base has this id, or a component there takes an argument of this name."""
    parent, _, name = path.rpartition("#")
    try:
        holder = find(base, parent) if parent else base
    except KeyError:
        return False
    return name in holder or ("_target_" in holder and name in inspect.signature(target(holder)).parameters)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_says_in_one_line_what_it_is_for(name: str) -> None:
    description = CONFIG[name]["_desc_"]
    assert len(description) > 10 and "\n" not in description
    assert next(iter(CONFIG[name])) == "_desc_"


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_has_no_unknown_id(name: str) -> None:
    below = BELOW.get(name, ["train", "inference", "evaluate"])
    unknown = {
        key
        for key in (key.lstrip("+") for key in CONFIG[name])
        if key != "_desc_" and not any(is_known(key, CONFIG[base]) for base in below)
    }
    assert unknown == ADDED.get(name, set())


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_replaces_options_by_the_same_options(name: str) -> None:
    """A plain dict replaces the whole one below it."""
    for key, value in CONFIG[name].items():
        if isinstance(value, dict) and "_target_" not in value and key not in ADDED.get(name, set()):
            assert value.keys() == find(CONFIG["train"], key).keys()


@pytest.mark.parametrize("key", ["learning_rat", "network_def#feature", "train#dataset#cache", "network_def#norm#type"])
def test_a_typo_would_be_found(key: str) -> None:
    assert not is_known(key, CONFIG["train"])


@pytest.mark.parametrize(
    "names",
    [("train",), ("inference",), ("inference", "evaluate"), ("train", "multi_gpu_train"), ("mlflow",)],
    ids="+".join,
)
def test_components_exist_and_take_their_arguments(names: tuple[str, ...]) -> None:
    found = components(merged(*names))
    assert len(found) >= 3
    for path, component in found:
        made = target(component)
        assert callable(made), f"{path}: there is no {component['_target_']}"
        try:
            inspect.signature(made).bind(**arguments(component))
        except TypeError as error:
            pytest.fail(f"{path}: {component['_target_']}: {error}")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_macros_and_no_handler_by_its_position(name: str) -> None:
    ids = [key for path, part in nodes(CONFIG[name]) if isinstance(part, dict) for key in part]
    texts = [part for _, part in nodes(CONFIG[name]) if isinstance(part, str)]
    assert not [text for text in ids + texts if text.startswith("%")]
    assert not [text for text in ids + texts if re.search(r"handlers(#|::)?\[?\d", text)]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_only_run_runs(name: str) -> None:
    """MONAI Label's clients may have the whole file evaluated: two runnable ids would train twice."""
    running = [key for key, value in CONFIG[name].items() if ".run()" in json.dumps(value)]
    assert running == (["run"] if name in BASES else [])
    aliases = {key: value for key, value in CONFIG[name].items() if "@run" in json.dumps(value)}
    assert aliases == ({"training": "@run"} if name == "train" else {})


def test_training_and_inference_agree() -> None:
    train, inference = CONFIG["train"], CONFIG["inference"]
    shared = train.keys() & inference.keys()
    assert {key for key in shared if train[key] != inference[key]} == DIFFERENT
    assert shared >= {"network_def", "roi_size", "overlap", "seed_threshold", "foreground_threshold", "min_size"}
    assert shared >= {"fill_holes", "weights", "data_root", "dataset_dir", "spatial_dims", "output_dir", "ckpt_dir"}


def test_validation_is_inference() -> None:
    validate, inference = CONFIG["train"]["validate"], CONFIG["inference"]
    assert validate["inferer"] == inference["inferer"]
    steps = [step for step in inference["postprocessing"]["transforms"] if step["_target_"] != "SaveImaged"]
    assert validate["postprocessing"]["transforms"] == steps
    assert {**inference["dataloader"], "dataset": "@validate#dataset"} == validate["dataloader"]


def test_validation_is_evaluation() -> None:
    train, evaluate = CONFIG["train"], CONFIG["evaluate"]
    for key in ("val_fraction", "group_pattern", "partial_truth"):
        assert evaluate[key] == train[key]
    (name, metric), *others = evaluate["key_metric"].items()
    edge = {"edge": "$@partial_truth['edge']"}  # which training's labels leave out already
    assert metric == train["validate"]["key_metric"][name] | edge and not others
    loading = CONFIG["inference"]["preprocessing"]["transforms"]["_target_"]
    assert train["train"]["deterministic_transforms"]["_target_"] == loading


def test_distributed_overlays_start_and_end_alike() -> None:
    train, evaluate = CONFIG["multi_gpu_train"], CONFIG["multi_gpu_evaluate"]
    assert train["device"] == evaluate["device"] and train["finalize"] == evaluate["finalize"]
    assert [step for step in train["initialize"] if "seed" not in step] == evaluate["initialize"]


@pytest.mark.parametrize(
    "names, kind",
    [
        (("train",), "train"),
        (("train", "3d"), "train"),
        (("inference",), "infer"),
        (("inference", "3d"), "infer"),
        (("inference", "evaluate"), "eval"),
        (("inference", "evaluate", "3d"), "eval"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else value,
)
def test_workflow_has_all_properties(names: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    data = tiny_set(tmp_path, 3 if "3d" in names else 2)
    made = workflow(names, kind, dataset_dir=data, **training_paths(tmp_path), **TINY_NETWORK)
    assert made.check_properties() == []
    assert made.dataset_dir == data and len(made.dataset_data if kind != "train" else made.train_dataset_data) >= 2


@pytest.mark.parametrize("names", [("train",), ("inference", "evaluate")], ids="+".join)
@pytest.mark.parametrize("name", DATASETS)
def test_dataset_overlay_leads_into_the_data_directory(
    name: str, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path))
    parser = ConfigParser(merged(*names, name))
    found = parser.get_parsed_content("dataset_dir")
    for folder in found if isinstance(found, list) else [found]:
        assert Path(folder).is_relative_to(tmp_path) and Path(folder) != tmp_path
    fraction = parser.get_parsed_content("val_fraction")
    assert fraction is None or 0 < fraction < 1


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_overlay_splits_the_real_images(name: str, real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(real_data))
    parser = ConfigParser(merged("inference", "evaluate", name))
    keys = ("dataset_dir", "val_fraction", "group_pattern")
    options = {key: parser.get_parsed_content(key) for key in keys} | {"truth": "evaluation", "check": False}
    training, validation = (
        {item["image"] for item in make_datalist(section=section, **options)} for section in ("training", "validation")
    )
    assert training and validation and not training & validation
    assert len(validation) < len(training)


def test_metadata_fits_the_schema() -> None:
    schema = ROOT.parent / "shared" / "acceptance" / Path(METADATA["schema"]).name
    if not schema.is_file():
        pytest.skip(f"needs {schema.name}: {schema} is not there")
    pytest.importorskip("jsonschema").validate(METADATA, json.loads(schema.read_text()))


def test_metadata_has_a_change_for_its_version() -> None:
    version = METADATA["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert version in METADATA["changelog"]
    assert version == max(METADATA["changelog"], key=lambda text: [int(part) for part in text.split(".")])
    changelog = ROOT / "CHANGELOG.md"
    if changelog.is_file():
        assert version in changelog.read_text()


def test_metadata_describes_the_network() -> None:
    formats = METADATA["network_data_format"]
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    assert (next(iter(formats["inputs"])), next(iter(formats["outputs"]))) == ("image", "pred")
    for part in (image, pred):
        assert list(part["channel_def"]) == [str(channel) for channel in range(part["num_channels"])]
    network = CONFIG["train"]["network_def"]
    assert (image["num_channels"], pred["num_channels"]) == (network["in_channels"], network["out_channels"])
    assert len(image["spatial_shape"]) == len(pred["spatial_shape"]) == CONFIG["train"]["spatial_dims"]


def test_metadata_names_the_tested_packages() -> None:
    constraints = ROOT / "constraints.txt"
    if not constraints.is_file():
        pytest.skip("needs constraints.txt, which is not part of the bundle")
    tested = dict(line.split("==") for line in constraints.read_text().splitlines() if "==" in line)
    main = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    named = METADATA["required_packages_version"] | {package: METADATA[key] for package, key in main.items()}
    assert named == {package: tested.get(package) for package in named}
    assert "optional_packages_version" not in METADATA  # MONAI would replace the required ones by these
