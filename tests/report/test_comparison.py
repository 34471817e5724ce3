"""Two fronts compared, against moocore and a plain definition of dominance."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import moocore
import numpy as np
import pytest
from shelf import shelve
from views import make_view
