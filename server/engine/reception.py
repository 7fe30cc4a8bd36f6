"""Entry of requests into the engine: room for their images, and the queue of arrivals."""

from __future__ import annotations

from collections import Counter
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, TypeVar

from server.engine.backlog import Amounts, Backlog, Bounds, Holding
from server.engine.client import ANONYMOUS, Client
from server.engine.footprint import Kind, footprint, heaviest
from server.engine.reservation import Reservation
from server.engine.scheduler import Priority
from server.engine.state.sequence import Sequence, units_of
from server.engine.state.submission import Submission
from server.engine.tick.pictures import latents_of
from server.errors import InvalidRequest, NotReady, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Listed
    from threading import Condition

    from server.engine.cost_model import CostModel
    from server.engine.metrics import EngineMeasurements
    from server.engine.state.arrivals import Arrivals
    from server.engine.state.overflows import Overflows
    from server.engine.state.sequence import Listener
    from server.engine.task import ImageTask
    from server.models.hosted import HostedModel

__all__ = ["Reception"]

Result = TypeVar("Result")


class Reception:
    """Admits images to an engine, and counts them until they leave it; safe from any thread.

    The objects that it is given belong to the engine and change with it.

    Args:
        models: hosted models by name.
        bounds: limits on what may wait or run. Frames of live streams are counted separately, with
            the same limit on their number.
        wake: condition that is held during any change here, and notified of arrivals.
        arrived: images that the engine has not admitted yet.
        overflows: sizes that recently did not fit into memory.
        costs: tick costs, from which the seconds of waiting images are estimated.
        measurements: counters of pending and of refused images.
        pace: function that returns the share of the device that ordinary images have.
        check_open: function that raises NotReady while the engine accepts no work.
    """

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        bounds: Bounds,
        *,
        wake: Condition,
        arrived: Arrivals,
        overflows: Overflows,
        costs: CostModel,
        measurements: EngineMeasurements,
        pace: Callable[[], float],
        check_open: Callable[[], None],
    ) -> None:
        self._models = models
        self._bounds = bounds
        self._wake = wake
        self._arrived = arrived
        self._overflows = overflows
        self._costs = costs
        self._measurements = measurements
        self._pace = pace
        self._check_open = check_open
        self._backlog = Backlog(bounds, self._seconds_a_row)
        self._text_bytes = Counter[tuple[str, int]]()

    def reserve(
        self, images: int, *, live: bool = False, client: Client = ANONYMOUS, runs: int = 1
    ) -> Reservation:
        """Reserve room for the images of one request; safe from any thread.

        Reserve before uploads are decoded or plans are made, so that a refused request costs
        nothing, and claim the cost of the images as soon as it is known. Submit to the reservation,
        and release it in any case.

        Args:
            images: number of images; each drawing of an image counts.
            client: client of the request, whose share of the device the images use.
            live: whether they are of live priority, for which there is separate room of the same
                size: a queue full of ordinary requests does not hold up a stream.
            runs: number of times that each image is drawn; the client's limit counts an image once.

        Raises:
            Overloaded: there is no room for all of them.
            InvalidRequest: the client may never have this many.
            NotReady: the engine is not warm yet, or has stopped or failed.
        """
        with self._wake:
            self._check_open()
            if live:
                holding = self._reserve_live(client, images)
            else:
                holding = self._counting_refusals(
                    images,
                    lambda: self._backlog.reserve(client, images, self._pace(), runs=runs),
                )
            self._count_pending(images, live=live)
        return Reservation(
            images,
            partial(self._claim, holding, live=live),
            partial(self._take_in, holding, live=live),
            partial(self._release, holding, live=live),
        )

    def submit(
        self, tasks: Listed[ImageTask], listener: Listener, client: Client = ANONYMOUS
    ) -> Submission:
        """Queue the images of one request without a reservation; safe from any thread.

        Raises:
            Overloaded: there is no room for all of them.
            NotReady: the engine is not warm yet, or has stopped or failed.
            InvalidRequest: an image or a group needs more rows at once than a forward pass has, or
                the client may never have this many images.
        """
        live = all(task.priority is Priority.LIVE for task in tasks)
        with self.reserve(len(tasks), live=live, client=client) as room:
            return room.submit(tasks, listener)

    def check_memory(self, tasks: Listed[ImageTask]) -> None:
        """Refuse images like those that recently did not fit on the device, before any work.

        Args:
            tasks: tasks of a request; their pictures need no content yet. Safe from any thread.

        Raises:
            InvalidRequest: an image or a group is as large as one that did not fit.
        """
        groups: dict[object, list[ImageTask]] = {}
        for task in tasks:
            if self._overflows.knows(task.model):
                groups.setdefault(task.group or task, []).append(task)
        for members in groups.values():
            first, rows = members[0], ceil(sum(map(self._heaviest, members)))
            refers = bool(first.references)
            self._overflows.check(first.model, first.width, first.height, rows, refers=refers)

    def waiting(self) -> dict[Client, Amounts]:
        """Estimated ordinary work of each client, waiting or running; safe from any thread."""
        with self._wake:
            return self._backlog.by_client()

    def count_rows(self, sequence: Sequence, remaining: float | None = None) -> None:
        """Update what an ordinary image still needs in the backlog; call while ``wake`` is held."""
        remaining = sequence.remaining if remaining is None else remaining
        more = remaining - sequence.counted
        self._backlog.count_rows(sequence.submission.holding, self._kind(sequence.task), more)
        sequence.counted = remaining

    def release(self, sequence: Sequence) -> None:
        """Return the room of an image that has left the engine."""
        with self._wake:
            if not sequence.live:
                self.count_rows(sequence, 0)
                self._backlog.end_image(sequence.submission.holding)
            self._count_pending(-1, live=sequence.live)

    def note_text_bytes(self, sequence: Sequence) -> None:
        """Record the size of encoded texts of its model, from which later images are estimated.

        Text encoders that see pictures produce more for a text. The latents of these pictures,
        which follow the text here, are counted with the image's states.
        """
        if not sequence.conditioning:
            return
        task = sequence.task
        nbytes = max(one.nbytes for one in sequence.conditioning.values())
        pictures = sum(latents_of(sequence, one).nbytes for one in task.references)
        key = task.model, len(task.references)
        self._text_bytes[key] = max(self._text_bytes[key], nbytes - pictures)

    def _bytes_of_text(self, model: str, pictures: int) -> int:
        """Bytes of a text of a model with this many pictures, or with fewer if that is known."""
        return max(self._text_bytes[model, fewer] for fewer in range(pictures + 1))

    def _reserve_live(self, client: Client, images: int) -> Holding:
        if self._measurements.live_pending + images > self._bounds.images:
            # A frame of a stream waits for room; its stream retries.
            raise Overloaded(1.0)
        return Holding(client, images)

    def _counting_refusals(self, images: int, admit: Callable[[], Result]) -> Result:
        try:
            return admit()
        except Overloaded:
            self._measurements.refused += images
            raise

    def _claim(self, holding: Holding, tasks: Listed[ImageTask], *, live: bool) -> None:
        if live:
            return
        self._check_models(tasks)
        needed = footprint(tasks, self._kind, self._bytes_of_text)
        with self._wake:
            self._counting_refusals(
                holding.images, lambda: self._backlog.claim(holding, *needed, self._pace())
            )

    def _take_in(
        self, holding: Holding, tasks: Listed[ImageTask], listener: Listener, *, live: bool
    ) -> Submission:
        if any((task.priority is Priority.LIVE) != live for task in tasks):
            raise ValueError("room is reserved either for live images or for others")
        images = len(tasks)
        submission = Submission(images, Holding(holding.client, images))
        sequences = [
            Sequence(task, index, listener, submission) for index, task in enumerate(tasks)
        ]
        self._note_width(sequences)
        self.check_memory(tasks)
        self._check_models(tasks)
        # Frames of live streams are not counted in the backlog.
        counted = [] if live else tasks
        needed = footprint(counted, self._kind, self._bytes_of_text)
        with self._wake:
            self._check_open()
            self._check_models(tasks)
            if not live:
                submission.holding = self._backlog.move(holding, images, *needed)
                for sequence in sequences:
                    self.count_rows(sequence)
            self._arrived.extend(sequences)
            self._wake.notify()
        return submission

    def _release(self, holding: Holding, images: int, *, live: bool) -> None:
        with self._wake:
            if not live:
                self._backlog.release(holding)
            self._count_pending(-images, live=live)

    def _count_pending(self, images: int, *, live: bool) -> None:
        with self._wake:
            self._measurements.pending += images
            self._measurements.live_pending += images * live

    def _seconds_a_row(self, kind: Kind) -> float:
        if kind[0] not in self._models:
            # The model was unloaded, so none of its images waits.
            return 0.0
        max_rows = self._measurements.fixed_rows or self._measurements.row_budget
        return self._costs.seconds_a_row(*kind, max_rows)

    def _check_models(self, tasks: Listed[ImageTask]) -> None:
        if gone := {task.model for task in tasks} - self._models.keys():
            raise NotReady(f"Model {gone.pop()!r} was unloaded; send the request again.")

    def _note_width(self, sequences: Listed[Sequence]) -> None:
        """Set the rows that are needed at once; refuse images that no tick could run."""
        budget = self._measurements.row_budget
        for members in units_of(sequences):
            rows = sum(member.guidance.widest for member in members)
            if rows > budget:
                images = len(members)
                together = f" for the {images} images of its group" if images > 1 else ""
                fewer = "images, branches" if images > 1 else "branches"
                raise InvalidRequest(
                    "guidance",
                    f"guidance needs {rows} rows of a forward pass at once{together}; at most "
                    f"{budget} are allowed here, so ask for fewer {fewer} or perturbations.",
                )
            for member in members:
                member.rows_at_once = rows

    def _heaviest(self, task: ImageTask) -> float:
        """Maximum rows of a stage; a row that also reads references counts as more than one."""
        read = self._kind(task)[1]
        own = self._models[task.model].latent_shape(task.width, task.height)
        return heaviest(task) * read[2] / own[2]

    def _kind(self, task: ImageTask) -> Kind:
        model = self._models[task.model]
        return task.model, model.forward_shape(task.width, task.height, task.references)
