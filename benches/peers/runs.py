"""What the scripts that compare share: a figure from a process of its own."""

import json
import subprocess
import sys


def run(command):
    """The last line that a program prints, which is JSON; ends with its errors where it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{command} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])
