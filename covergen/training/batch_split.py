"""How a global batch is divided: among the processes, evenly or not, and into pieces that fit into memory.

However many there are of either, the gradient is that of the mean loss over the whole batch.
"""

from __future__ import annotations

from torch import Tensor

from covergen.data.batch import Batch
from covergen.data.sampling import rank_slice
from covergen.runs.config import Training


class BatchSplit:
    """One rank's ``part`` (a slice) of every global batch, in ``pieces`` of these sizes, one after the other.

    A mean over the global batch is the mean over ranks of the sum over pieces of their means times ``weights``. Where
    there are more ranks than covers, some have a cover that does not count.
    """

    def __init__(self, training: Training, rank: int, ranks: int, needs_whole_batch: bool) -> None:
        """ValueError for uneven parts or pieces where a model compares all covers of a batch, or with --sync_bn."""
        size = training.batch_size
        own, least, most = (rank_slice(size, one, ranks) for one in (rank, 0, ranks - 1))
        even, cut = len(most) == len(least), 0 < training.micro_batch < len(most)
        if (needs_whole_batch or training.sync_bn) and (cut or not even):
            what = "--sync_bn" if training.sync_bn else "this model, which compares all covers of a global batch,"
            raise ValueError(f"{what} needs processes that share --batch_size {size} evenly, without --micro_batch; "
                             f"nearest for {ranks}: --batch_size {max(1, round(size / ranks)) * ranks}")
        self.part = slice(own.start, own.stop) if own else slice(0, 1)
        count = max(len(own), 1)
        piece = training.micro_batch if cut else count
        self.pieces = [min(piece, count - start) for start in range(0, count, piece)]
        self.weights = [len(own) and number * ranks / size for number in self.pieces]
        notices = [f"each update's gradient is accumulated over pieces of at most {piece} covers"] if cut else []
        if not even:
            notices.append(f"{ranks} processes share {size} covers unevenly, {len(least)} to {len(most)} each; their "
                           "gradients are accumulated by weight, to that of the whole batch")
        self.notice = "; ".join(notices) or None

    def split(self, batch: Batch) -> list[Batch]:
        """The pieces of this rank's part of a global batch."""
        if len(self.pieces) == 1:
            return [batch]
        columns = [[None] * len(self.pieces) if column is None else column.split(self.pieces) for column in batch]
        return [Batch(*piece) for piece in zip(*columns, strict=True)]

    def split_noise(self, noise: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The same of noise for a whole global batch."""
        columns = {name: values[self.part].split(self.pieces) for name, values in noise.items()}
        return [{name: pieces[number] for name, pieces in columns.items()} for number in range(len(self.pieces))]
