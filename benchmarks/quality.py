"""Quality per second on this CPU: bits per byte of unseen text after some minutes of training.

    python benchmarks/quality.py --source FOLDER --out DIR            the whole comparison, resumable
    python benchmarks/quality.py --source FOLDER --out DIR --table    what is known so far

Three contenders learn the same documents with `fledge.train.loop`: `planner` is what `fledge plan
laptop --base.minutes M` chooses; `recipe` is nanochat's depth-4 network (32,768 words, T = 512, all
extras, no windows) with its own optimizer and schedules; `adamw` is that network with every
parameter under AdamW. The two get the best of {4K, 8K, 16K} tokens a step and of three learning
rates, tried with runs of a sixth of the time; the planner's choice is taken as it is.

A run is as many steps as fit into the minutes at the speed that the contender has on a quiet
machine (`--speed`, measured in turns, kept in speeds.json): its bits per byte then do not depend on
who else computes. They are those of whole held-out documents, every byte scored once behind at
least half a context. Rows go to results.jsonl; what is there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bare_hooks import BareHooks

from fledge.config import KEYS, parse_recipe
from fledge.data.loader import Ahead, Loader
from fledge.data.sources import Corpus, open_corpus
from fledge.data.tokenized import TextDocuments
from fledge.engine import Engine
from fledge.evals import bpb
from fledge.model import Transformer
from fledge.optim.adamw import AdamW
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.plan.hardware import detect
from fledge.plan.planner import Plan, resolve
from fledge.stages.pipeline import keep_freed_memory
from fledge.tokenizer import Tokenizer
from fledge.train.loop import Job, train
