r"""SSAMBA: self-supervised audio, patches of a spectrogram read in both directions by Mamba and partly guessed.

Paper: SSAMBA: Self-Supervised Audio Representation Learning with Mamba State Space Model (arXiv:2405.11831).
Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model (arXiv:2401.09417).
Paper: SSAST: Self-Supervised Audio Spectrogram Transformer (arXiv:2110.09784).

A spectrogram is cut into patches, each a token. Some are masked, and the model has to tell which patch belongs to which
masked place, and to draw it. The encoder is that of Vision Mamba: a recurrence that runs forwards and one that runs
backwards over the same projection, since no patch is before another in time and in frequency at once; its cost
grows with the number of patches, not with their square.

Equation:
    A block projects once, for both directions; $\overleftarrow{\cdot}$ reverses the sequence:
    $$ [u, z] = W_{in} x, \qquad
       y = \tfrac12 W_{out} \left( \mathrm{SSM}_f(u) \odot \mathrm{silu}(z)
       + \overleftarrow{\mathrm{SSM}_b(\overleftarrow u) \odot \mathrm{silu}(\overleftarrow z)} \right) \tag{1} $$
    where each SSM is the convolution, selection and recurrence of Mamba with weights of its own. Tokens are projections
    of patches with learned positions; of the N masked ones a learned vector takes the place:
    $$ e_i = W x_i + b, \text{ or } m \text{ where masked}, \qquad h = \mathrm{encoder}(e + p) \tag{2} $$
    With heads $c_i$ and $r_i$ (linear, ReLU, linear) on $h_i$, over the masked patches of one spectrogram:
    $$ L_d = -\frac1N \sum_i \log \frac{e^{c_i \cdot x_i}}{\sum_j e^{c_i \cdot x_j}}, \qquad
       L_g = \frac1{N P} \sum_i \lVert r_i - x_i \rVert^2, \qquad L = L_d + \lambda L_g \tag{3} $$

Symbols:
    spectrogram: [batch, frequency, time], log mel energies, normalised.
    patches, x: [batch, n, P], the pixels of each patch, P = height * width; time runs first along n.
    mask: [batch, n], True where a patch is masked; N of each spectrogram, the same number for all.
    cls_out, c: [batch, n, P], what is to be like the patch.
    rec_out, r: [batch, n, P], the patch as it is guessed.
    u, z: [batch, n, d_inner], d_inner = 2 d_model.

Defaults:
    patch: 16 x 16, of 128 mel bins and 1024 frames: 512 patches (authors' script).
    masked: 400 of 512 (authors' code; 250 and 300 were trained as well).
    lam: 10 (authors' code).
    d_model, depth: 192, 384 and 768 (tiny, small, base), 24 blocks (authors' scripts).
    d_state: 16 (Vision Mamba).
    cluster: 3 to 5 patches wide and high, drawn for each spectrogram (authors' code).
    d_conv, expand: 4 and 2 (Vision Mamba).

Deviations:
    1. The sum in L_g is divided by the P pixels of a patch, as the authors' code has it; lambda = 10 is for that form.
       The papers write it without the division.
    2. The softmax of L_d runs over the patches, as the papers write it. The authors' code runs it over the predictions,
       $e^{c_i \cdot x_i} / \sum_j e^{c_j \cdot x_i}$, and draws another mask for each of the two parts.
    3. There is no class token; features are means over patches, as in the authors' fine-tuning. Their last norm is
       applied twice, and blocks run in pairs, on the sequence and on its reverse, that are added up; here once, and one
       after another, as in Vision Mamba.
    4. Clusters end at the border of the spectrogram. In the authors' code they go on in the next row, the first patch
       is never masked, and of a mask that became too large the patches with the smallest numbers stay.

Reduces to:
    mamba: a block whose backward branch is shut (its D and C are zero), with W_out twice that of Mamba.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number, check_sequence
from mlreviews.common.layers import linear
from mlreviews.ssm.mamba import SelectiveSSM

__all__ = [
    "SSAMBA",
    "BiMambaBlock",
    "BiMambaEncoder",
    "MaskedPatchLoss",
    "cluster_mask",
    "masked_patch_loss",
    "to_patches",
]


class MaskedPatchLoss(NamedTuple):
    """The parts of (3), each a number.

    Attributes:
        total: L.
        disc: L_d, in nats.
        gen: L_g, in squared units of the spectrogram.
    """

    total: Tensor
    disc: Tensor
    gen: Tensor


def to_patches(
    spectrogram: Float[Tensor, "batch frequency time"], height: int, width: int
) -> Float[Tensor, "batch patches pixels"]:
    """Cuts spectrograms into patches that don't overlap; what is left over at the upper ends is dropped.

    Args:
        spectrogram: [batch, frequency, time].
        height: of a patch, in frequency bins.
        width: of a patch, in frames.

    Returns:
        [batch, rows * columns, height * width]: patches row by row (time runs first), and so their pixels.

    Raises:
        ValueError: not three axes, or not one whole patch.
    """
    check_count("height", height)
    check_count("width", width)
    if spectrogram.ndim != 3 or spectrogram.shape[0] == 0:
        raise ValueError(f"spectrogram: expected [batch, frequency, time], got shape {tuple(spectrogram.shape)}")
    batch, rows, columns = spectrogram.shape[0], spectrogram.shape[1] // height, spectrogram.shape[2] // width
    if rows == 0 or columns == 0:
        raise ValueError(
            f"spectrogram: expected at least one patch of {height} x {width}, got shape {tuple(spectrogram.shape)}"
        )
    whole = spectrogram[:, : rows * height, : columns * width]
    cut = whole.reshape(batch, rows, height, columns, width).transpose(2, 3)
    return cut.reshape(batch, rows * columns, height * width)


def cluster_mask(
    batch: int, rows: int, columns: int, masked: int, *, generator: torch.Generator | None
) -> Bool[Tensor, "batch patches"]:
    """Masks of squares of 3 to 5 patches' width that are thrown until the wanted number of patches is covered.

    Of the last square only as many patches as are missing are taken, at random.

    Args:
        batch: how many masks.
        rows: patches along frequency.
        columns: patches along time.
        masked: N, how many patches each mask covers.
        generator: a CPU generator; None is the global one.

    Returns:
        [batch, rows * columns], True where masked, on the CPU.

    Raises:
        ValueError: a count below 1, or more to be masked than there is.
    """
    for name, count in (("batch", batch), ("rows", rows), ("columns", columns), ("masked", masked)):
        check_count(name, count)
    if masked > rows * columns:
        raise ValueError(f"masked: expected at most the {rows * columns} patches there are, got {masked}")
    found = torch.zeros(batch, rows, columns, dtype=torch.bool)
    for mask in found:
        side = int(torch.randint(3, 6, (), generator=generator))
        missing = masked
        while missing:
            start = int(torch.randint(rows * columns, (), generator=generator))
            row, column = divmod(start, columns)
            square = torch.zeros_like(mask)
            square[row : row + side, column : column + side] = True
            new = (square & ~mask).nonzero()
            new = new[torch.randperm(len(new), generator=generator)[:missing]]
            mask[new[:, 0], new[:, 1]] = True
            missing -= len(new)
    return found.flatten(1)


def masked_patch_loss(
    cls_out: Float[Tensor, "batch patches pixels"],
    rec_out: Float[Tensor, "batch patches pixels"],
    patches: Float[Tensor, "batch patches pixels"],
    mask: Bool[Tensor, "batch patches"],
    lam: float = 10.0,
) -> MaskedPatchLoss:
    """The loss (3), the mean over spectrograms; no patch is compared with one of another spectrogram.

    Args:
        cls_out: c, [batch, patches, pixels].
        rec_out: r, [batch, patches, pixels].
        patches: x, [batch, patches, pixels]; no gradient flows into them.
        mask: [batch, patches], True for the N patches that count, in each row the same number.
        lam: lambda, the weight of L_g, not negative.

    Returns:
        ``(total, disc, gen)``, in float32 for half-precision arguments.

    Raises:
        ValueError: shapes differ, no patch is masked, or not the same number in each row (checked on the CPU only: a
            GPU would have to be waited for).
    """
    check_number("lam", lam, least=0.0)
    if patches.ndim != 3 or patches.numel() == 0:
        raise ValueError(
            f"patches: expected [batch, patches, pixels] with no empty axis, got shape {tuple(patches.shape)}"
        )
    for name, tensor in (("cls_out", cls_out), ("rec_out", rec_out)):
        if tensor.shape != patches.shape:
            raise ValueError(f"{name}: expected {list(patches.shape)}, as patches has, got shape {tuple(tensor.shape)}")
    if mask.dtype != torch.bool or mask.shape != patches.shape[:2]:
        raise ValueError(
            f"mask: expected bool {list(patches.shape[:2])}, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = mask.sum(1).unique().tolist()
        if len(counts) > 1 or counts[0] == 0:
            raise ValueError(f"mask: expected the same number of masked patches in each row, not 0, got {counts}")
    dtype = torch.promote_types(patches.dtype, torch.float32)
    x, c, r = patches.detach().to(dtype), cls_out.to(dtype), rec_out.to(dtype)
    # Masked sums in place of a choice of rows: no shape depends on the mask's numbers.
    logits = (c @ x.mT).masked_fill(~mask[:, None], -math.inf)
    own = logits.diagonal(dim1=1, dim2=2)
    nats = torch.where(mask, logits.logsumexp(2) - torch.where(mask, own, 0.0), 0.0)
    squares = torch.where(mask, (r - x).square().mean(2), 0.0)
    total = mask.sum()
    disc, gen = nats.sum() / total, squares.sum() / total
    return MaskedPatchLoss(disc + lam * gen, disc, gen)


class _Direction(SelectiveSSM):
    """SSM(u) * silu(z), from the first token to the last."""

    def forward(
        self, u: Float[Tensor, "batch patches d_inner"], z: Float[Tensor, "batch patches d_inner"]
    ) -> Float[Tensor, "batch patches d_inner"]:
        u, _ = self.convolve(u)
        return self.scan(u, *self.selection(u), z)[0]


class BiMambaBlock(nn.Module):
    """The block of equation (1).

    Args:
        d_model: size of input and output.
        d_state: N, states a channel.
        d_conv: width of the convolutions.
        expand: channels as a multiple of d_model.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            check_count(name, size)
        self.d_model, d_inner, rank = d_model, expand * d_model, math.ceil(d_model / 16)
        self.in_proj = linear(d_model, 2 * d_inner, bias=False, generator=generator)
        self.forwards, self.backwards = (
            _Direction(d_inner, d_state, d_conv, rank, generator=generator) for _ in range(2)
        )
        self.out_proj = linear(d_inner, d_model, bias=False, generator=generator)

    def forward(self, x: Float[Tensor, "batch patches d_model"]) -> Float[Tensor, "batch patches d_model"]:
        """Equation (1).

        Args:
            x: [batch, patches, d_model].

        Raises:
            ValueError: x has another shape.
        """
        check_sequence(x, self.d_model)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.forwards(u, z) + self.backwards(u.flip(1), z.flip(1)).flip(1)
        return self.out_proj(y / 2)


class BiMambaEncoder(nn.Module):
    """Pre-norm residual blocks and a norm.

    Args:
        d_model: size of a token's vector.
        depth: number of blocks.
        d_state: N, states a channel.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, d_model: int, depth: int, d_state: int = 16, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_count("depth", depth)
        self.blocks = nn.ModuleList(BiMambaBlock(d_model, d_state, generator=generator) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(depth))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Float[Tensor, "batch patches d_model"]) -> Float[Tensor, "batch patches d_model"]:
        """Runs over a sequence in both directions.

        Args:
            x: [batch, patches, d_model].
        """
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return self.norm(x)


class SSAMBA(nn.Module):
    """Patches, encoder and the two heads, for pretraining and for features.

    Args:
        rows: patches along frequency.
        columns: patches along time.
        height: of a patch, in frequency bins.
        width: of a patch, in frames.
        d_model: size of a token's vector.
        depth: blocks of the encoder.
        d_state: N, states a channel.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        rows: int = 8,
        columns: int = 64,
        height: int = 16,
        width: int = 16,
        d_model: int = 192,
        depth: int = 24,
        d_state: int = 16,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("rows", rows), ("columns", columns), ("height", height), ("width", width)):
            check_count(name, size)
        self.rows, self.columns, self.height, self.width = rows, columns, height, width
        pixels = height * width
        self.encoder = BiMambaEncoder(d_model, depth, d_state, generator=generator)
        self.proj = linear(pixels, d_model, generator=generator)
        self.positions = nn.Parameter(torch.empty(rows * columns, d_model))
        nn.init.trunc_normal_(self.positions, std=0.02, generator=generator)
        self.mask_embed = nn.Parameter(torch.randn(d_model, generator=generator) * d_model**-0.5)
        self.cls_head, self.rec_head = (
            nn.Sequential(
                linear(d_model, d_model, generator=generator), nn.ReLU(), linear(d_model, pixels, generator=generator)
            )
            for _ in range(2)
        )

    def patches(self, spectrogram: Float[Tensor, "batch frequency time"]) -> Float[Tensor, "batch patches pixels"]:
        """As `to_patches`; the size has to be that of the model.

        Args:
            spectrogram: [batch, rows * height, columns * width].

        Raises:
            ValueError: it has another shape.
        """
        size = (self.rows * self.height, self.columns * self.width)
        if spectrogram.ndim != 3 or spectrogram.shape[1:] != size:
            raise ValueError(
                f"spectrogram: expected [batch, {size[0]}, {size[1]}], got shape {tuple(spectrogram.shape)}"
            )
        return to_patches(spectrogram, self.height, self.width)

    def features(
        self, spectrogram: Float[Tensor, "batch frequency time"], mask: Bool[Tensor, "batch patches"] | None = None
    ) -> Float[Tensor, "batch patches d_model"]:
        """What the encoder makes of each patch, equation (2); their mean is the feature of the spectrogram.

        Args:
            spectrogram: [batch, rows * height, columns * width].
            mask: [batch, patches], True where the model must not see the patch; None is nowhere.

        Raises:
            ValueError: a shape is another.
        """
        tokens = self.proj(self.patches(spectrogram))
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
                raise ValueError(
                    f"mask: expected bool {list(tokens.shape[:2])}, got {mask.dtype} of shape {tuple(mask.shape)}"
                )
            tokens = torch.where(mask[..., None], self.mask_embed, tokens)
        return self.encoder(tokens + self.positions)

    def forward(
        self, spectrogram: Float[Tensor, "batch frequency time"], mask: Bool[Tensor, "batch patches"] | None = None
    ) -> tuple[Float[Tensor, "batch patches pixels"], Float[Tensor, "batch patches pixels"]]:
        """Both heads at all patches: ``(cls_out, rec_out)``, for `masked_patch_loss`. Arguments as of `features`."""
        h = self.features(spectrogram, mask)
        return self.cls_head(h), self.rec_head(h)

    def pretraining_loss(
        self,
        spectrogram: Float[Tensor, "batch frequency time"],
        mask: Bool[Tensor, "batch patches"],
        lam: float = 10.0,
    ) -> MaskedPatchLoss:
        """The loss (3) of spectrograms under a mask; arguments as of `features` and `masked_patch_loss`."""
        cls_out, rec_out = self(spectrogram, mask)
        return masked_patch_loss(cls_out, rec_out, self.patches(spectrogram), mask, lam)
