"""The code of docs/one_line.md runs, page order."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs/one_line.md"


# What Lightning itself warns of: its loader has no workers, its logger is off, a deprecated import of its own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_page_runs(capsys, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    assert "violent" in capsys.readouterr().out

    emulator = namespace["Emulator"]()
    before = [p.detach().clone() for p in emulator.parameters()]
    data = torch.utils.data.TensorDataset(namespace["x"], namespace["y"])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = namespace["lightning"].Trainer(accelerator="cpu", max_steps=3, default_root_dir=tmp_path, **quiet)
    trainer.fit(emulator, torch.utils.data.DataLoader(data, batch_size=16))
    assert all(not torch.equal(a, b) for a, b in zip(before, emulator.parameters(), strict=True))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["loss.log_inverse_temperature"].isfinite(), "the start of the solver is saved with the rest"
