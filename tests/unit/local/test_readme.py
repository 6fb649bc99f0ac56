import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[3] / "README.md"


def test_the_manifest_of_the_readme_is_valid(tmp_path: Path) -> None:
    found = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    file = tmp_path / "job.yaml"
    file.write_text(found[0], encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "trimtab", "validate", str(file)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
