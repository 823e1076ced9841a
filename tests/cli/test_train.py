from __future__ import annotations

import json
import signal
import sys
import time

import pytest
import torch

from effdet.engine import checkpoint as checkpoints
from effdet.engine import trainer as trainer_module
from effdet.engine.log import read_log
from effdet.engine.weights import load_model
from effdet.factory import create_model

_QUICK = ("--size", 64, "--batch-size", 4, "--epochs", 2, "--threads", 1, "--workers", 0)


@pytest.fixture(scope="module")
def uninterrupted(scenes, tmp_path_factory):
    """A finished run of 2 epochs, 3 steps each, without evaluation."""
    from effdet.cli import main

    out = tmp_path_factory.mktemp("uninterrupted")
    args = ["train", scenes, "--out", out, *_QUICK, "--eval-every", 0, "--quiet"]
    assert main([str(a) for a in args]) == 0
    return out


def _assert_equal_state(first, second):
    for key in ("state_dict", "state_dict_ema"):
        assert first[key].keys() == second[key].keys()
        for name, value in first[key].items():
            assert torch.equal(value, second[key][name]), f"{key} {name}"


def test_a_run_leaves_checkpoints_log_and_plot(cli, scenes, tmp_path):
    out = tmp_path / "run"
    result = cli("train", scenes, "--out", out, *_QUICK, "--log-every", 2, "--workers", 1)
    assert result.code == 0, result.err
    assert "done, best AP" in result.out
    names = {p.name for p in out.iterdir()}
    assert {"last.pth", "log.jsonl"} <= names
    assert not [n for n in names if n.endswith(".part")]
    records = read_log(out / "log.jsonl")
    assert records[0]["kind"] == "config" and records[0]["seed"] == 42
    assert [r["step"] for r in records if r["kind"] == "step"] == [2, 3, 4, 6]
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == [1, 2]
    assert all(0 <= r["AP"] <= 1 for r in records if r["kind"] == "epoch")
    content = checkpoints.read(out / "last.pth")
    assert content["class_names"] == ["circle", "square", "triangle", "star", "cross"]
    assert content["image_size"] == [64, 64] and content["epoch"] == 2


def test_two_runs_are_equal_bit_for_bit_whatever_the_workers(cli, scenes, tmp_path, uninterrupted):
    args = [*_QUICK, "--workers", 2, "--eval-every", 0, "--quiet"]
    assert cli("train", scenes, "--out", tmp_path / "b", *args).code == 0
    _assert_equal_state(
        checkpoints.read(uninterrupted / "last.pth"), checkpoints.read(tmp_path / "b" / "last.pth")
    )


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_stopped_and_resumed_equals_uninterrupted(
    cli, scenes, tmp_path, monkeypatch, uninterrupted, stop_after
):
    out = tmp_path / "run"
    original = trainer_module.Trainer._train_step

    def step_then_interrupt(self, *args):
        lr = original(self, *args)
        if self.step + 1 == stop_after:
            signal.raise_signal(signal.SIGINT)
        return lr

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_train_step", step_then_interrupt)
        result = cli("train", scenes, "--out", out, *_QUICK, "--eval-every", 0, "--quiet")
    assert result.code == 130
    assert f"effdet train --resume {out / 'last.pth'}" in result.out
    assert checkpoints.read(out / "last.pth")["step_in_epoch"] == (stop_after - 1) % 3 + 1
    torch.manual_seed(12345)  # what the process did in between must not matter
    result = cli("train", "--resume", out / "last.pth", "--threads", 1, "--quiet")
    assert result.code == 0, result.err
    _assert_equal_state(
        checkpoints.read(uninterrupted / "last.pth"), checkpoints.read(out / "last.pth")
    )


def test_the_last_epochs_stay_and_a_run_goes_on_from_one(cli, scenes, tmp_path):
    out = tmp_path / "run"
    args = [*_QUICK, "--epochs", 3, "--eval-every", 0, "--keep", 2, "--quiet"]
    assert cli("train", scenes, "--out", out, *args).code == 0
    kept = sorted(p.name for p in out.glob("epoch-*.pth"))
    assert kept == ["epoch-2.pth", "epoch-3.pth"]
    last = checkpoints.read(out / "last.pth")
    _assert_equal_state(checkpoints.read(out / "epoch-3.pth"), last)
    args = ["--out", tmp_path / "again", "--threads", 1, "--keep", 1, "--quiet"]
    assert cli("train", "--resume", out / "epoch-2.pth", *args).code == 0
    _assert_equal_state(checkpoints.read(tmp_path / "again" / "last.pth"), last)
    assert [p.name for p in (tmp_path / "again").glob("epoch-*.pth")] == ["epoch-3.pth"]


def test_ctrl_c_as_a_user_presses_it(cli_process, scenes, tmp_path):
    out = tmp_path / "run"
    args = [*_QUICK, "--epochs", 500, "--eval-every", 0, "--log-every", 1]
    process = cli_process("train", scenes, "--out", out, *args)
    deadline = time.monotonic() + 120
    log = out / "log.jsonl"
    while not (log.exists() and '"step": 4' in log.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stdout and "Traceback" not in stderr
    content = checkpoints.read(out / "last.pth")
    assert content["epoch"] * 3 + content["step_in_epoch"] >= 4


def test_fine_tuning_starts_from_the_weights_with_a_new_head(cli, scenes, tmp_path, weights):
    document = json.loads((scenes / "instances_train.json").read_text())
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(scenes / "images")
    document["categories"] = [{"id": 7, "name": "shape"}]
    for annotation in document["annotations"]:
        annotation["category_id"] = 7
    (data / "instances_train.json").write_text(json.dumps(document))
    args = [*_QUICK, "--epochs", 1, "--eval-every", 0, "--quiet"]
    args += ["--checkpoint", weights, "--freeze-backbone"]
    result = cli("train", data, "--out", tmp_path / "run", *args)
    assert result.code == 0, result.err
    content = checkpoints.read(tmp_path / "run" / "last.pth")
    assert content["class_names"] == ["shape"] and content["category_ids"] == [7]
    before = torch.load(weights, weights_only=True)["state_dict"]
    after = content["state_dict"]
    frozen = [name for name in before if name.startswith("backbone.")]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    fpn = "fpn.cell.0.fnode.0.after_combine.conv.conv_pw.weight"
    assert not torch.equal(before[fpn], after[fpn])


@pytest.mark.parametrize("pretrained", ["coco", "imagenet"])
def test_published_weights_to_start_from(cli, scenes, tmp_path, monkeypatch, pretrained):
    """With a stand-in for what is published: other weights of the same network, kept by a frozen backbone."""
    torch.manual_seed(1)
    published = create_model("tf_efficientdet_lite0", pretrained_backbone=False)
    file = tmp_path / "published.pth"
    torch.save(published.state_dict(), file)
    monkeypatch.setattr("effdet.helpers.download", lambda url: file)
    features = published.backbone.state_dict()
    monkeypatch.setattr("effdet.engine.trainer.import_timm", lambda: "timm")
    monkeypatch.setattr(
        "effdet.backbone.timm_models.load_imagenet_weights",
        lambda backbone, name: backbone.load_state_dict(features),
    )
    args = [*_QUICK, "--epochs", 1, "--eval-every", 0, "--quiet", "--freeze-backbone"]
    args += ["--model", "tf_efficientdet_lite0", "--pretrained", pretrained]
    result = cli("train", scenes, "--out", tmp_path / "run", *args)
    assert result.code == 0, result.err
    trained = checkpoints.read(tmp_path / "run" / "last.pth")["state_dict"]
    assert all(torch.equal(trained[f"backbone.{name}"], v) for name, v in features.items())
    name = "fpn.cell.0.fnode.0.after_combine.conv.conv_pw.weight"
    moved = (trained[name] - published.state_dict()[name]).abs().max()
    assert (moved < 0.05) == (pretrained == "coco")


def test_timm_that_is_missing_is_named(cli, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("effdet.engine.trainer.import_timm", lambda: None)
    result = cli("train", scenes, "--out", tmp_path / "run", *_QUICK, "--pretrained", "imagenet")
    assert result.code == 1 and "pretrained: got 'imagenet', which takes timm" in result.err


def test_an_old_run_is_not_overwritten(cli, scenes, uninterrupted):
    before = (uninterrupted / "last.pth").read_bytes()
    result = cli("train", scenes, "--out", uninterrupted, *_QUICK)
    assert result.code == 1
    assert "last.pth exists" in result.err and "--resume" in result.err
    assert (uninterrupted / "last.pth").read_bytes() == before


def test_a_run_that_was_moved_goes_on_where_its_checkpoint_is(cli, uninterrupted, tmp_path):
    (tmp_path / "last.pth").write_bytes((uninterrupted / "last.pth").read_bytes())
    before = (uninterrupted / "log.jsonl").read_bytes()
    assert cli("train", "--resume", tmp_path / "last.pth", "--quiet").code == 0
    assert read_log(tmp_path / "log.jsonl")[0]["resumed_at_step"] == 6
    assert (uninterrupted / "log.jsonl").read_bytes() == before


def test_mixed_precision_trains_on_the_cpu(cli, scenes, tmp_path):
    args = [*_QUICK, "--epochs", 1, "--eval-every", 0, "--amp", "bf16", "--quiet"]
    result = cli("train", scenes, "--out", tmp_path / "run", *args)
    assert result.code == 0, result.err
    content = checkpoints.read(tmp_path / "run" / "last.pth")
    values = [v for v in content["state_dict"].values() if v.is_floating_point()]
    assert all(v.dtype == torch.float32 and bool(v.isfinite().all()) for v in values)


def test_resuming_with_another_recipe_is_refused(cli, uninterrupted):
    result = cli("train", "--resume", uninterrupted / "last.pth", "--lr", 0.5)
    assert result.code == 1
    assert "lr: got 0.5, but the run to resume has" in result.err


def test_resuming_from_plain_weights_is_refused(cli, weights):
    result = cli("train", "--resume", weights)
    assert result.code == 1
    assert str(weights) in result.err and "--checkpoint" in result.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batch-size", 13], "batch_size: got 13"),
        (["--model", "efficientdet_none"], "efficientdet_none"),
        (["--train-split", "other"], "other"),
        (["--lr", -1], "lr: got -1.0"),
        (["--scale-min", 3], "scale_max: got 2.0"),
        (["--size", 16], "size: got 16"),
        (["--amp", "fp16", "--device", "cpu"], "amp: got 'fp16' on the CPU"),
        (["--device", "cuda:99"], "device: got 'cuda:99'"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(cli, scenes, tmp_path, options, says):
    out = tmp_path / "run"
    result = cli("train", scenes, "--out", out, *options)
    assert result.code == 1
    assert says in result.err
    assert not out.exists()


def test_a_diverging_run_says_so(cli, scenes, tmp_path):
    args = [*_QUICK, "--lr", 1e12, "--warmup-epochs", 0, "--clip-grad", 0, "--eval-every", 0]
    result = cli("train", scenes, "--out", tmp_path / "run", *args, "--quiet")
    assert result.code == 1
    assert "a lower learning rate than 1e+12" in result.err


def _epsilons(checkpoint):
    norms = [m for m in load_model(checkpoint=checkpoint).model.modules() if hasattr(m, "eps")]
    return {norm.eps for norm in norms}


def test_the_papers_epsilon_goes_with_the_weights(cli, scenes, tmp_path):
    out = tmp_path / "run"
    args = [*_QUICK, "--eval-every", 0, "--keep", 2, "--quiet"]
    assert cli("train", scenes, "--out", out, *args, "--recipe", "paper").code == 0
    record = read_log(out / "log.jsonl")[0]
    assert record["lr"] == pytest.approx(0.08 * 4 / 128)
    assert record["warmup_epochs"] == pytest.approx(0.05 * 2)
    assert _epsilons(out / "last.pth") == {1e-4}
    assert cli("export", out / "last.pth", "--out", tmp_path / "small.pth").code == 0
    (small,) = tmp_path.glob("small-*.pth")
    assert _epsilons(small) == {1e-4}
    again = tmp_path / "again"
    assert cli("train", "--resume", out / "epoch-1.pth", "--out", again, "--quiet").code == 0
    assert _epsilons(again / "last.pth") == {1e-4}
    _assert_equal_state(checkpoints.read(again / "last.pth"), checkpoints.read(out / "last.pth"))
    tuned = tmp_path / "tuned"
    args = [*_QUICK, "--eval-every", 0, "--quiet", "--checkpoint", small, "--recipe", "finetune"]
    assert cli("train", scenes, "--out", tuned, *args).code == 0
    assert _epsilons(tuned / "last.pth") == {1e-4}
    assert read_log(tuned / "log.jsonl")[0]["lr"] == pytest.approx(0.008 * 4 / 64)


def test_restart_begins_and_goes_on(cli, scenes, tmp_path, uninterrupted):
    out = tmp_path / "run"
    args = [scenes, "--out", out, *_QUICK, "--eval-every", 0, "--restart", "--quiet"]
    assert cli("train", *args).code == 0
    _assert_equal_state(
        checkpoints.read(uninterrupted / "last.pth"), checkpoints.read(out / "last.pth")
    )
    assert cli("train", *args).code == 0
    configs = [r for r in read_log(out / "log.jsonl") if r["kind"] == "config"]
    assert [r["resumed_at_step"] for r in configs] == [0, 6]
    result = cli("train", *args, "--lr", 0.5)
    assert result.code == 1 and "lr: got 0.5" in result.err


def test_restart_without_a_folder_is_wrong_usage(cli, scenes, uninterrupted, monkeypatch):
    monkeypatch.chdir(uninterrupted)  # which has a last.pth
    result = cli("train", scenes, "--restart")
    assert result.code == 2 and "OUT is missing" in result.err


def test_tensorboard_that_is_missing_is_named(cli, scenes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "run"
    result = cli("train", scenes, "--out", out, *_QUICK, "--tensorboard")
    assert result.code == 1
    assert "effdet-kernels[tensorboard]" in result.err
    assert not out.exists()
