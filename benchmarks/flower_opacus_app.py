"""A Flower app with PEFT and Opacus, the way their examples show it: what `flower_opacus.py` compares Lorica with.

Every message builds the model, puts LoRA in, wraps it with Opacus, trains some steps and sends the adapter back. The
records are kept between the messages of a process. FedAvg takes the mean of the adapters.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from opacus import PrivacyEngine
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lorica.adapters.base_files import resolve_base
from lorica.config import TaskConfig
from lorica.tasks.loading import load_tests

BASE = "lorica:glyph-vit"
LABELS = 10
server = ServerApp()
client = ClientApp()
warnings.simplefilter("ignore")


class Timed(FedAvg):
    """FedAvg that notes when each round has ended."""

    def __init__(self, nodes: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        self.ends = [time.perf_counter()]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        found = super().aggregate_train(server_round, replies)
        self.ends.append(time.perf_counter())
        return found


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the rounds, and write the seconds of each to the file `times`."""
    settings = context.run_config
    while len(list(grid.get_node_ids())) < int(settings["clients"]):
        time.sleep(0.1)
    strategy = Timed(int(settings["clients"]))
    start = ArrayRecord(get_peft_model_state_dict(build()))
    result = strategy.start(grid, start, num_rounds=int(settings["rounds"]))
    moved = result.arrays.to_torch_state_dict()
    seconds = [end - begin for begin, end in itertools.pairwise(strategy.ends)]
    learned = any(bool(value.any()) for name, value in moved.items() if "lora_B" in name)
    Path(str(settings["times"])).write_text(json.dumps({"seconds": seconds, "learned": learned}))


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on this client's records."""
    settings = context.run_config
    torch.set_num_threads(int(settings["threads"]))
    records = own_records(int(context.node_config["partition-id"]), int(settings["clients"]))
    adapted = build()
    set_peft_model_state_dict(adapted, message.content["arrays"].to_torch_state_dict())
    model, optimizer, loader = PrivacyEngine().make_private(
        module=adapted.train(),
        optimizer=torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=float(settings["lr"])),
        data_loader=DataLoader(records, batch_size=int(settings["batch"])),
        noise_multiplier=float(settings["noise-multiplier"]),
        max_grad_norm=float(settings["clip-norm"]),
        poisson_sampling=True,
    )
    criterion = nn.CrossEntropyLoss()
    for pixels, labels in itertools.islice(_endless(loader), int(settings["steps"])):
        optimizer.zero_grad()
        if len(labels):
            criterion(model(pixel_values=pixels).logits, labels).backward()
            optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(adapted)),
            "metrics": MetricRecord({"num-examples": len(records)}),
        }
    )
    return Message(content=content, reply_to=message)


def build() -> PeftModel:
    """The base model with LoRA in it and a new head."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        resolve_base(BASE), num_labels=LABELS, ignore_mismatched_sizes=True, local_files_only=True
    )
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return get_peft_model(model, settings)


@lru_cache(1)
def _everything() -> tuple[Tensor, Tensor]:
    source = TaskConfig(type="image-classification", train="", test="lorica:digits/train")
    records = load_tests(source, resolve_base(BASE)).test
    batch = records.batch(np.arange(len(records)))
    return batch.inputs["pixel_values"], batch.labels


def own_records(number: int, clients: int) -> TensorDataset:
    """An equal random part of the embedded digits, as pixels."""
    pixels, labels = _everything()
    order = np.random.default_rng(0).permutation(len(labels))
    own = torch.from_numpy(np.array_split(order, clients)[number])
    return TensorDataset(pixels[own], labels[own])


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader
