"""The code of docs/one_line.md runs, page order."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/one_line.md"


def test_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    namespace: dict[str, object] = {}
    for block in blocks:
        if "import lightning\n" in block:  # not a dependency: its Trainer is stood in for by the bare module
            block = block.replace("import lightning\n", "").replace("lightning.LightningModule", "torch.nn.Module")
        block = block.replace("from lightning.fabric", "from lightning_fabric")
        exec(block, namespace)
    emulator = namespace["Emulator"]()
    emulator.log_dict = lambda numbers: None
    assert emulator.training_step((namespace["x"], namespace["y"]), 0).requires_grad
    assert emulator.configure_optimizers() is not None
    assert "violent" in capsys.readouterr().out
