"""The code of docs/one_line.md runs, page order."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs/one_line.md"


def run_page(lightning: bool) -> dict[str, Any]:
    """The names that the page defines; without Lightning its module is stood in for by the bare one."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    namespace: dict[str, Any] = {}
    for block in blocks:
        if not lightning:
            block = block.replace("import lightning\n", "").replace("lightning.LightningModule", "torch.nn.Module")
            block = block.replace("from lightning.fabric", "from lightning_fabric")
        exec(block, namespace)
    return namespace


def test_page_runs(capsys):
    pytest.importorskip("lightning_fabric", reason="pip install 'squall[train]'")
    namespace = run_page(lightning=False)
    assert "violent" in capsys.readouterr().out
    emulator = namespace["Emulator"]()
    emulator.log_dict = lambda numbers: None
    assert emulator.training_step((namespace["x"], namespace["y"]), 0).requires_grad
    assert emulator.configure_optimizers() is not None


# What Lightning itself warns of: its loader has no workers, its logger is off, a deprecated import of its own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_lightning_trains_the_module_of_the_page(tmp_path):
    pytest.importorskip("lightning", reason="pip install -e '.[lightning]'")
    namespace = run_page(lightning=True)
    emulator = namespace["Emulator"]()
    before = [p.detach().clone() for p in emulator.parameters()]
    data = torch.utils.data.TensorDataset(namespace["x"], namespace["y"])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = namespace["lightning"].Trainer(accelerator="cpu", max_steps=3, default_root_dir=tmp_path, **quiet)
    trainer.fit(emulator, torch.utils.data.DataLoader(data, batch_size=16))
    assert all(not torch.equal(a, b) for a, b in zip(before, emulator.parameters(), strict=True))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not [name for name in state if name.startswith("loss.")], "the loss has no state, like torch.nn.MSELoss"
