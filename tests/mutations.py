"""All mutations of models: those that keep the meaning (`KEEPING`) and those that change it (`CHANGING`)."""

from __future__ import annotations

import mutations_changing
import mutations_of_graphs
import mutations_of_nodes
import mutations_of_tensors
from mutation_kinds import CHANGING, KEEPING, Mutation, mutate

REGISTERED = (mutations_of_tensors, mutations_of_nodes, mutations_of_graphs, mutations_changing)

__all__ = ["CHANGING", "KEEPING", "REGISTERED", "Mutation", "mutate"]
