from circuitmill.stores.mirror import WandbMirror


def test_the_mirror_stays_offline_and_below_its_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    mirror = WandbMirror(tmp_path, config={"lr": 1e-3}, identity="abc123")
    mirror.log({"step": 1, "tokens": 32, "ev": 0.5, "l0": [1.0, 2.0], "speed": None})
    mirror.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*-abc123")
    assert any(run.glob("*.wandb"))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
