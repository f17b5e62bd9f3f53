"""The repository's root on the path: recipes are imported as `recipes.x`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))
