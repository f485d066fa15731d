"""Options from files: what they mean, and a thousand ways in which they are wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsae import cli
from fastsae.commands import train
from fastsae.options import as_arguments, read_options, rule_from

HINTS = train.train_options()


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("acts") / "acts.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.standard_normal((300, 8)).astype(np.float32))
    return path


def failing(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in args])
    code = ended.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err
    assert code not in (0, None)
    assert isinstance(code, str) and message.startswith("fastsae: error: "), message
    assert len(message.strip().splitlines()) == 1, message
    return message


def test_a_file_is_the_same_as_arguments(acts: Path, tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'data = "{acts}"\nd_sae = 32\nk = 3\nsteps = 4\nbatch_size = 16\nholdout = 50\n'
        'lr = 1e-3\nscale = false\nselection = {name = "batchtopk"}\nema = 0.5\n'
    )
    options = read_options(toml, HINTS)
    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps(options))
    typed = "--d-sae 32 --k 3 --steps 4 --batch-size 16 --holdout 50 --lr 1e-3 --no-scale".split()
    typed += ["--selection", "batchtopk", "--ema", "0.5", "--data", str(acts)]
    cli.main(["train", "--config", str(toml), "--out", str(tmp_path / "toml")])
    cli.main(["train", f"--config={as_json}", "--out", str(tmp_path / "json")])
    cli.main(["train", *typed, "--out", str(tmp_path / "typed")])
    runs = [tmp_path / name for name in ("toml", "json", "typed")]
    for name in ("run.json", "sae.safetensors"):
        assert len({(run / name).read_bytes() for run in runs}) == 1, name
    # What is typed comes after what a file says, and a run's options are a file like any other.
    over = ["--config", str(runs[0] / "run.json"), "--k", "2", "--selection", "topk", "--scale"]
    cli.main(["train", *over, "--out", str(tmp_path / "over")])
    resolved = json.loads((tmp_path / "over" / "run.json").read_text())
    assert resolved["selection"]["name"] == "topk" and resolved["k"] == 2 and resolved["scale"]
    assert resolved["ema"] == 0.5 and resolved["selection"]["k"] == 2
    given, parameters = train.with_files(["--config", str(runs[0] / "run.json"), "--k", "5"])
    assert "k" not in parameters and parameters["decay"] and given[-2:] == ["--k", "5"]


WRONG: dict[str, tuple[str, str]] = {
    "unknown": ('{"d_sea": 3}', "d_sea: there is no such option; did you mean d_sae?"),
    "out": ('{"out": "elsewhere"}', "out: there is no such option"),
    "kind": ('{"steps": "ten"}', "steps: expected an integer, got 'ten'"),
    "float": ('{"steps": 1e3}', "steps: expected an integer, got 1000.0"),
    "bool": ('{"steps": true}', "steps: expected an integer, got True"),
    "null": ('{"k": null}', "k: expected an integer, got None"),
    "literal": ('{"optimizer": "sgd"}', "optimizer: expected adam, adam-lazy, torch-adam, got"),
    "list": ('{"lr": [1]}', "lr: expected a number or null, got [1]"),
    "table": ('{"selection": {"k": 3}}', "selection: expected a table with a name"),
    "rule": ('{"selection": {"name": "best"}}', "selection: expected one of "),
    "parameter": ('{"selection": {"name": "topk", "q": 1}}', "selection.q: topk has the parame"),
    "json": ('{"steps": 3', "not readable as JSON"),
    "not-object": ("[1]", "expected a JSON object, got list"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line(
    acts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path, out = tmp_path / "options.json", tmp_path / "run"
    path.write_text(text)
    line = failing(
        capsys, "train", "--config", path, "--out", out, "--data", acts, "--d-sae", 32, "--k", 3
    )
    assert message in line and not out.exists()
    for missing in ("absent.json", "absent.toml"):
        line = failing(capsys, "train", "--config", tmp_path / missing, "--out", out)
        assert f"{missing}: no such file" in line
    (tmp_path / "bad.toml").write_text("steps = = 3")
    line = failing(capsys, "train", "--config", tmp_path / "bad.toml", "--out", out)
    assert "bad.toml: not readable as TOML" in line


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
HOSTILE = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@HOSTILE
@given(st.dictionaries(st.sampled_from(sorted(HINTS)) | st.text(max_size=5), values, min_size=1))
def test_hostile_options_give_one_line_or_mean_something(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps(options))
    try:
        arguments, parameters = as_arguments(read_options(path, HINTS))
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return
    assert len(arguments) == len(options)
    assert all(argument.startswith("--") for argument in arguments)
    if isinstance(options.get("selection"), dict):
        name = options["selection"]["name"]
        try:
            rule = rule_from(name, 4, parameters)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert rule.name == name


@HOSTILE
@given(data=st.binary(max_size=120), kind=st.sampled_from(["json", "toml"]))
def test_hostile_files_give_one_line(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / f"options.{kind}"
    path.write_bytes(data)
    try:
        assert read_options(path, HINTS) == {}
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
