"""Principal components of an encoder's tokens: fitted once, kept in a file, applied to every token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repalign.encoders.frozen import digest
from repalign.errors import UserError

FORMAT = "repalign-pca"
TENSORS = ("mean", "std", "center", "components", "variance")


class PCA(nn.Module):
    """z = ((f - mean) / std - center) components^T, per token f [..., D] -> [..., K].

    Args:
        mean, std: [D], of every dimension over the data set, std of the population.
        center: [D], mean of the standardised tokens; zero but for rounding, yet the released file of ReDi has entries
            up to 0.55, so it is subtracted.
        components: [K, D], orthonormal rows, the largest variance first. Scores are not whitened.
        variance: [K], of the scores (unbiased).
        provenance: what it was fitted on, for people and for checks; values are texts.

    Source: ReDi, arXiv:2504.16064, section 3.1.
    """

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]
    center: Float[Tensor, " d"]
    components: Float[Tensor, "k d"]
    variance: Float[Tensor, " k"]

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        center: Tensor,
        components: Tensor,
        variance: Tensor,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in zip(TENSORS, (mean, std, center, components, variance), strict=True):
            self.register_buffer(name, value.detach().float())
        self.provenance = dict(provenance or {})

    @property
    def fingerprint(self) -> str:
        """Stands for all numbers."""
        return digest(self, FORMAT)

    def forward(self, tokens: Float[Tensor, "*b d"], rank: int) -> Float[Tensor, "*b r"]:
        """Scores of the first ``rank`` components, in float32 whatever the surrounding autocast."""
        with torch.autocast(tokens.device.type, enabled=False):
            return ((tokens.float() - self.mean) / self.std - self.center) @ self.components[:rank].T

    def save(self, path: Path) -> None:
        """Write a .safetensors whose metadata hold the provenance and the fingerprint."""
        held = {name: getattr(self, name).contiguous().cpu() for name in TENSORS}
        save_file(held, path, {**self.provenance, "format": FORMAT, "fingerprint": self.fingerprint})


class PCAFit:
    """Moments of a stream of tokens in float64, and the components that follow from them.

    The covariance of the standardised tokens is that of the tokens divided by std std^T, so one pass is enough.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        # MPS has no float64; the moments then stay on the host.
        self.device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64, device=self.device)
        self.products = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)

    def update(self, tokens: Float[Tensor, "*b d"]) -> None:
        """Take tokens of any leading shape."""
        rows = tokens.detach().to(self.device).double().flatten(0, -2)
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def finish(self, components: int | None = None, provenance: Mapping[str, str] | None = None) -> PCA:
        """The components, each with its largest entry positive.

        Args:
            components: how many are kept; None for all D.
            provenance: see :class:`PCA`.

        Raises:
            UserError: with fewer tokens than dimensions, a dimension that never changes, or too many components.
        """
        dim = len(self.total)
        if self.count <= dim:
            raise UserError(f"task.pictures: {self.count} tokens do not fix {dim} components; give more pictures")
        kept = dim if components is None else components
        if not 1 <= kept <= dim:
            raise UserError(f"task.components: expected 1 to {dim}, the encoder's width, found {components}")
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        std = covariance.diagonal().clamp(min=0).sqrt()
        if not (std > 0).all():
            raise UserError(f"pca: dimension {int((std <= 0).nonzero()[0])} of the tokens never changes")
        unbiased = covariance / torch.outer(std, std) * (self.count / (self.count - 1))
        variance, vectors = torch.linalg.eigh(unbiased)
        rows = vectors.T.flip(0)[:kept]
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        return PCA(mean, std, torch.zeros_like(mean), rows * largest.sign(), variance.flip(0)[:kept], provenance)


def read_pca(path: str | Path | None) -> PCA:
    """The file that ``task=fit_pca`` wrote.

    Raises:
        UserError: naming the key ``pca.path`` when there is none, or it is torn, foreign or changed.
    """
    mend = "fit one by task=fit_pca (to draw pictures alone, pca=random does)"
    if path is None:
        raise UserError(
            f"pca.path: has no value; set pca.path=FILE or the environment variable REPALIGN_PCA, or {mend}"
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"pca.path: no file '{path}'; {mend}")
    try:
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata() or {})
            held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"pca.path: '{path}' cannot be read ({error}); {mend}") from error
    if metadata.pop("format", None) != FORMAT or set(held) != set(TENSORS):
        raise UserError(f"pca.path: '{path}' is no file of this project's components; {mend}")
    expected = metadata.pop("fingerprint", "")
    pca = PCA(**held, provenance=metadata)
    if pca.fingerprint != expected:
        raise UserError(f"pca.path: '{path}' has other numbers than were written to it; {mend}")
    return pca


def random_pca(dim: int) -> PCA:
    """Orthonormal directions without a meaning, the same each time: for tests and for sampling, which reads none."""
    generator = torch.Generator().manual_seed(0)
    rows, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    zeros, ones = torch.zeros(dim), torch.ones(dim)
    return PCA(zeros, ones, zeros, rows.T, ones, {"encoder": ""})
