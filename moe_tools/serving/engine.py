"""What computes the orders."""

from __future__ import annotations

from abc import ABC, abstractmethod

from moe_tools.serving.order import Order


class Engine(ABC):
    """Takes orders from an event loop, and computes them in threads of its own."""

    slots: int
    """Orders that run at once."""
    room: int | None
    """Tokens of one order that it has memory for, prompt and answer; None: no bound of its own."""

    @abstractmethod
    def submit(self, order: Order) -> None:
        """Begins, or says in `order.end` why not; returns at once."""

    @abstractmethod
    def cancel(self, order: Order) -> None:
        """Ends the work on an order, which is told so; nothing of one that has ended."""

    @abstractmethod
    def stop(self) -> None:
        """Ends all orders and threads, and waits for them."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it still computes."""
