import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_prune
from lightning_prune import L1Filter, OneShot, PrunedCheckpoint, load_pruned
from lightning_prune.cli import PruneCLI, told
from lightning_prune.commands import LIGHTNING, OWN, main, write
from lightning_prune.commands.digits import DigitsNet
from lightning_prune.methods import discover

# LightningCLI 2.6 calls what jsonargparse has since renamed.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:(?s).*was\s+deprecated\s+in\s+v4"),
    pytest.mark.filterwarnings(r"ignore:\s*By default only one Jsonargparse"),
]

EXAMPLES = Path(__file__).parents[1] / "examples" / "digits"
DIGITS = """
model: {class_path: lightning_prune.commands.digits.DigitsNet, init_args: {width: 4}}
data: {class_path: lightning_prune.commands.digits.DigitsData}
"""
QUIET = """  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 4
  limit_val_batches: 1
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    """Runs write where they run, and set the seed of the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def config(path, callbacks, trainer=QUIET):
    text = "seed_everything: 0\ntrainer:\n" + trainer + "  callbacks:\n" + callbacks + DIGITS
    Path(path).write_text(text, encoding="utf-8")
    return str(path)


def printed(capsys, *arguments):
    assert main([*arguments, "--print_config"]) == 0
    return capsys.readouterr().out


# what stands before every command


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [
        line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line.split()[0] in LIGHTNING | OWN
    ] == [
        *LIGHTNING,
        *OWN,
    ]
    assert main([]) == 0
    assert capsys.readouterr().out == shown


def test_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-prune {lightning_prune.__version__}\n"


@pytest.mark.parametrize("command", OWN)
def test_each_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: lightning-prune {command}" in capsys.readouterr().out


def test_unknown_command_is_one_line_and_status_two(capsys):
    assert main(["prune"]) == 2
    shown = capsys.readouterr()
    assert "invalid choice: 'prune'" in shown.err
    assert shown.err.count("\n") == 1


def test_wrong_option_is_one_line_and_status_two(capsys):
    assert main(["methods", "--in", "x"]) == 2
    assert capsys.readouterr().err == (
        "lightning-prune methods: error: unrecognized arguments: --in x; see lightning-prune methods --help\n"
    )


def failing(monkeypatch, error):
    def run(options):
        raise error

    monkeypatch.setattr("lightning_prune.commands.methods.run", run)


def test_error_is_one_line_and_a_traceback_only_with_debug(monkeypatch, capsys):
    failing(monkeypatch, ValueError("two\n  lines"))
    assert main(["methods"]) == 1
    assert capsys.readouterr().err == "lightning-prune methods: error: two lines\n"
    assert main(["methods", "--debug"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("lightning-prune methods: error: two lines\n")


def test_unexpected_error_says_its_type(monkeypatch, capsys):
    failing(monkeypatch, KeyError("stem"))
    assert main(["methods"]) == 1
    assert capsys.readouterr().err == "lightning-prune methods: error: KeyError: 'stem'\n"


def test_interrupt_is_no_traceback(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "lightning-prune methods: interrupted\n"


def test_write_leaves_text_and_json_in_a_new_directory(tmp_path, capsys):
    write(tmp_path / "a" / "b", "table.md", "| x |", [{"x": 1}])
    assert (tmp_path / "a" / "b" / "table.md").read_text("utf-8") == "| x |\n"
    assert yaml.safe_load((tmp_path / "a" / "b" / "table.json").read_text("utf-8")) == [{"x": 1}]
    assert capsys.readouterr().out.startswith("| x |\n")


@pytest.mark.processes  # python -m is a process of its own
def test_module_runs_as_the_program_does():
    source = str(Path(lightning_prune.__file__).parents[1])
    command = [sys.executable, "-m", "lightning_prune", "explain"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": source}, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lightning-prune explain: error: one of the arguments --model --config is required")


# LightningCLI


@pytest.mark.parametrize("name", [name for name, cls in discover().items() if cls.kind != "control"])
def test_callback_is_known_by_its_bare_name_and_four_lines_are_enough(name, capsys):
    path = config("run.yaml", f"    - class_path: {name}\n      init_args: {{budget: 0.5}}\n")
    (callback,) = yaml.safe_load(printed(capsys, "fit", "--config", path))["trainer"]["callbacks"]
    assert callback["class_path"] == f"lightning_prune.{name}"
    assert callback["init_args"]["budget"] == 0.5


@pytest.mark.parametrize("name", [name for name, cls in discover().items() if cls.kind != "control"])
def test_every_common_argument_is_in_the_config(name, capsys):
    path = config("run.yaml", f"    - class_path: {name}\n      init_args: {{budget: 0.5}}\n")
    (callback,) = yaml.safe_load(printed(capsys, "fit", "--config", path))["trainer"]["callbacks"]
    common = {"schedule", "ignore", "example_input", "calibration", "loss_fn", "on_nonfinite", "scope"}
    channels = {"apply", "round_to", "min_channels", "keep", "verify"}
    wanted = common | (channels if discover()[name].kind == "channels" else set())
    assert wanted <= callback["init_args"].keys()


def test_printed_config_is_read_back_as_the_same(capsys):
    path = config(
        "run.yaml",
        "    - class_path: TaylorWeight\n"
        "      init_args:\n"
        "        budget: {keep: 0.4, of: params}\n"
        "        schedule: {class_path: Iterative, init_args: {start: 0.2, end: 0.5, every: 0.1, curve: cubic}}\n"
        "        ignore: [stem, 'stage1.*']\n"
        "        'on': weight\n"
        "    - class_path: PrunedCheckpoint\n"
        "      init_args: {max_flops_kept: 0.5, monitor: val/acc, mode: max}\n",
    )
    first = printed(capsys, "fit", "--config", path)
    Path("again.yaml").write_text(first, encoding="utf-8")
    assert printed(capsys, "fit", "--config", "again.yaml") == first
    pruner = yaml.safe_load(first)["trainer"]["callbacks"][0]["init_args"]
    assert pruner["budget"] == {"keep": 0.4, "of": "params"}
    assert pruner["schedule"]["init_args"]["every"] == 0.1
    assert (pruner["ignore"], pruner["on"]) == (["stem", "stage1.*"], "weight")


def test_fit_trains_and_cuts_and_test_takes_the_checkpoint(capsys):
    path = config(
        "run.yaml",
        "    - class_path: L1Filter\n"
        "      init_args:\n"
        "        budget: {keep: 0.5, of: flops}\n"
        "        schedule: {class_path: OneShot, init_args: {at: 2, unit: step}}\n"
        "    - class_path: PrunedCheckpoint\n"
        "      init_args: {max_flops_kept: 0.5, monitor: val/acc, dirpath: kept, filename: cut}\n",
    )
    assert main(["fit", "--config", path, "--trainer.logger", "false"]) == 0
    net = load_pruned(DigitsNet, "kept/cut.ckpt")
    # the stream of the first stage has 4 channels dense; half of the flops is about 0.7 of each group's
    assert net.stem.out_channels < 4
    assert net.stage3.conv1.weight.shape[1] == net.stage2.conv2.weight.shape[0] < 8
    capsys.readouterr()
    assert main(["test", "--config", path, "--trainer.logger", "false", "--ckpt_path", "kept/cut.ckpt"]) == 0
    assert "test/acc" in capsys.readouterr().out


def test_config_says_what_the_constructor_would(monkeypatch):
    path = config(
        "run.yaml",
        "    - class_path: L1Filter\n"
        "      init_args:\n"
        "        budget: {keep: 0.3}\n"
        "        schedule: {class_path: OneShot, init_args: {at: 0.25}}\n"
        "        keep: {stem: 0.75}\n"
        "    - class_path: PrunedCheckpoint\n"
        "      init_args: {max_density: 0.5, monitor: val/acc}\n",
    )
    monkeypatch.setattr(sys, "argv", ["lightning-prune"])
    cli = PruneCLI(args=["--config", path], run=False, save_config_callback=None)
    pruner = next(callback for callback in cli.trainer.callbacks if isinstance(callback, L1Filter))
    same = L1Filter(0.3, schedule=OneShot(0.25), keep={"stem": 0.75})
    for attribute in ("budget", "schedule", "keep", "ignore", "mode", "scope", "apply"):
        assert getattr(pruner, attribute) == getattr(same, attribute)
    keeper = next(callback for callback in cli.trainer.callbacks if isinstance(callback, PrunedCheckpoint))
    assert (keeper.max_density, keeper.monitor) == (0.5, "val/acc")


def test_checkpoints_are_read_with_weights_only(capsys):
    path = config("run.yaml", "    - class_path: Magnitude\n      init_args: {budget: 0.5}\n")
    for command in LIGHTNING:
        assert yaml.safe_load(printed(capsys, command, "--config", path))["weights_only"] is True
    said = yaml.safe_load(printed(capsys, "test", "--config", path, "--weights_only", "false"))
    assert said["weights_only"] is False


def test_own_module_is_found_where_the_command_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets_of_mine", raising=False)
    (tmp_path / "nets_of_mine.py").write_text(
        "from lightning_prune.commands.digits import DigitsNet\nclass Mine(DigitsNet): pass\n", encoding="utf-8"
    )
    Path("run.yaml").write_text("model: {class_path: nets_of_mine.Mine}\n", encoding="utf-8")
    assert yaml.safe_load(printed(capsys, "fit", "--config", "run.yaml"))["model"]["class_path"] == "nets_of_mine.Mine"


@pytest.mark.parametrize(
    ("callback", "status", "message"),
    [
        (
            "{class_path: TaylorWait, init_args: {budget: 0.5}}",
            2,
            "no class 'TaylorWait' is known by its bare name; near: TaylorWeight",
        ),
        ("{class_path: L1Filter, init_args: {budget: {keep: 0.5, of: flopps}}}", 2, "given flopps"),
        ("{class_path: L1Filter, init_args: {budget: 0.5, rounded: 8}}", 2, "Option 'rounded' is not accepted"),
        ("{class_path: L1Filter}", 2, "arguments are required: budget"),
        ("{class_path: TaylorWeight, init_args: {budget: 0.5, on: weight}}", 2, "quote it: 'on'"),
        ("{class_path: L1Filter, init_args: {budget: {keep: 0}}}", 1, "keep must be in (0, 1]"),
        ("{class_path: L1Filter, init_args: {budget: 1.5}}", 1, "keep must be in (0, 1]"),
        ("{class_path: L1Filter, init_args: {budget: 0.5, ignore: [stam]}}", 1, "near names: 'stem'"),
    ],
)
def test_wrong_config_is_one_line_that_says_where_and_why(callback, status, message, capsys):
    path = config("run.yaml", f"    - {callback}\n")
    assert main(["fit", "--config", path, "--trainer.logger", "false"]) == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-prune")]
    assert line.startswith("lightning-prune fit: error: ")
    assert message in line
    assert "Union" not in line
    assert len(line) < 400


def test_missing_config_and_missing_model_are_status_two(capsys):
    assert main(["fit", "--config", "no.yaml"]) == 2
    assert "File does not exist" in capsys.readouterr().err
    assert main(["fit"]) == 2
    assert "model" in capsys.readouterr().err


def test_told_keeps_the_way_to_the_value_and_the_reason():
    said = (
        'Parser key "callbacks":\n  Does not validate against any of the Union subtypes\n  Subtypes: [list, None]\n'
        "  Errors:\n    - Option 'eventz' is not accepted\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'list'>\n  Given value: [{'eventz': 3}]"
    )
    assert told(said) == "Parser key \"callbacks\": Option 'eventz' is not accepted"
    assert told("Expected a <class 'int'>") == "Expected a <class 'int'>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("budget: half", "a budget is a fraction or {keep: 0.5, of: flops}, got 'half'"),
        ("budget: 0.5, ignor: [a]", "Option 'ignor' is not accepted; near: ignore"),
        ("budget: 0.5, zzz: 1", "Option 'zzz' is not accepted; L1Filter takes absorb, apply, budget, calibration, "),
    ],
)
def test_config_with_a_wrong_argument_says_what_a_callback_takes(capsys, arguments, message):
    callback = f"    - {{class_path: L1Filter, init_args: {{{arguments}}}}}\n"
    assert main(["fit", "--config", config("run.yaml", callback)]) == 2
    assert message in capsys.readouterr().err


def test_wrong_option_of_a_callback_on_the_command_line_is_told_once(capsys):
    path = config("run.yaml", "    - {class_path: L1Filter, init_args: {budget: 0.5}}\n")
    assert main(["fit", "--config", path, "--trainer.callbacks.ignor=a"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(
        "Problem with given class_path 'lightning_prune.L1Filter': Option 'ignor' is not accepted; near: ignore"
    )


# the examples


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_config_builds_its_method(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-prune"])
    cli = PruneCLI(args=["--config", str(path)], run=False, save_config_callback=None)
    modules = [type(callback).__module__ for callback in cli.trainer.callbacks]
    module = {"random_channels": "random", "random_weights": "random"}.get(path.stem, path.stem)
    assert f"lightning_prune.methods.{module}" in modules
    assert isinstance(cli.model, torch.nn.Module)


def test_each_method_has_an_example():
    named = {
        name
        for path in EXAMPLES.glob("*.yaml")
        for name in discover()
        if f"class_path: {name}\n" in path.read_text("utf-8")
    }
    assert named == discover().keys()


@pytest.mark.processes  # a script is run as a user runs it
def test_example_script_tells_its_story_in_under_a_hundred_lines(tmp_path):
    script = EXAMPLES.parent / "train_digits.py"
    assert len(script.read_text("utf-8").splitlines()) < 100
    source = str(Path(lightning_prune.__file__).parents[1])
    environment = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, str(script), "--fast"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "| flops  | 774,272 |" in done.stdout
    trained, reloaded = done.stdout.strip().splitlines()[-1].split(", of the checkpoint loaded again ")
    assert trained == f"test accuracy {reloaded}"
