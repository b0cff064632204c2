"""Sparse autoencoders: the k largest latents of a token rebuild it; plain, and variational."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
)
from regularizers._shared.distributed import add_up
from regularizers._shared.gaussian import kl_standard_normal, reparameterize
from regularizers._shared.randomness import check_caller_draws
from regularizers._shared.scheduled import ScheduledModule
from regularizers.ops._operator import accumulate_dtype
from regularizers.representation._sparse_rows import weighted_rows

Variance = Literal["fixed", "learned", "none"]
KLMask = Literal["all", "topk"]


class SAEOutput(NamedTuple):
    """What a sparse autoencoder makes of its input.

    Args:
        recon: the input rebuilt, ``[*, D]``.
        values: the k latents that were kept, ``[*, k]``.
        indices: which they are, int64 ``[*, k]``, in no order.
        pre: all latents before the selection, ``[*, M]``.

    Example:
        >>> output = TopKSAE(dim=8, dict_size=32, k=4)(torch.randn(5, 8))
        >>> output.features.count_nonzero(dim=1).max() <= 4
        tensor(True)
    """

    recon: Tensor
    values: Tensor
    indices: Tensor
    pre: Tensor

    @property
    def features(self) -> Tensor:
        """The latents after the selection, ``[*, M]`` with at most k that are not 0."""
        return torch.zeros_like(self.pre).scatter(-1, self.indices, self.values)


class SAELoss(NamedTuple):
    """The terms of a sparse autoencoder's loss, tensors with no dimensions, float32 or float64.

    Args:
        total: the loss.
        recon: mean squared norm of the error of a token.
        kl: divergence of the latents from the standard normal, without its weight; 0 in
            :class:`TopKSAE`.
        aux: how badly dead latents explain the error, without its weight.

    Example:
        >>> sae = TopKSAE(dim=8, dict_size=32, k=4)
        >>> loss = sae.loss(torch.randn(5, 8))
        >>> bool(loss.total == loss.recon)  # nothing is dead yet
        True
    """

    total: Tensor
    recon: Tensor
    kl: Tensor
    aux: Tensor


class TopKSAE(ScheduledModule):
    r"""Rebuild activations from the k largest of many latents: a dictionary with sparse codes.

    .. math::
        z = \mathrm{ReLU}(W_e x + b_e), \qquad \hat x = \sum_{m \in \mathrm{top}_k(z)} z_m d_m + b_d

    with the rows :math:`d_m` of ``decoder``. The loss over a batch of tokens is

    .. math::
        L = \overline{\|x - \hat x\|^2} + \alpha \frac{\overline{\|\mathrm{sg}(e) - \sum_{m \in
        \mathrm{top}_{k'}(z, \mathrm{dead})} z_m d_m\|^2}}{\overline{\|e - \bar e\|^2} + 10^{-8}},
        \qquad e = x - \hat x

    where the second term lets dead latents, silent for ``dead_after`` tokens of training, explain
    the error, so that they come alive again. It is 0 while no latent is dead, and for a single
    token, which has no variance. :meth:`attach` keeps the rows of the decoder at norm 1 while an
    optimizer trains them.

    The sparse sum reads k rows a token where that is faster than a dense product, as long as k is
    below a twelfth of the dictionary.

    Args:
        dim: D, features of an activation.
        dict_size: M, latents.
        k: latents kept for a token, from 1 to M.
        aux_k: k', dead latents that explain the error, from 1 to M; None: half of D.
        aux_weight: :math:`\alpha`, at least 0; may be assigned a number at any time. The paper's
            other setting is 1/2.
        dead_after: tokens without a value that is not 0 after which a latent is dead, at least 1.
        unit_norm_decoder: whether rows of the decoder start with norm 1 and :meth:`attach` keeps it
            (else they start with norm 0.1). The encoder starts as a copy of the decoder.
        subtract_decoder_bias: encode :math:`x - b_d` instead of x.
        process_group: processes whose batches are one: every process gets the loss of the whole,
            and counts silent latents over all.
        device: where the parameters go.
        dtype: their dtype.

    Shape:
        ``[*, D]`` to :class:`SAEOutput`; the entries of ``*`` are tokens.

    Raises:
        TypeError: an argument is of the wrong type, ``x`` not floating-point.
        ValueError: an argument is out of range, or ``x`` has other features.

    Example:
        >>> sae = TopKSAE(dim=16, dict_size=64, k=4)
        >>> optimizer = torch.optim.Adam(sae.parameters(), lr=5e-4)
        >>> sae.attach(optimizer)
        >>> sae.loss(torch.randn(32, 16)).total.backward()
        >>> optimizer.step()
        >>> bool((sae.decoder.norm(dim=1) - 1).abs().max() < 1e-5)
        True

    Source:
        The base of "Analysis of Variational Sparse Autoencoders", 2025, arXiv 2509.22994, authors'
        code read; the design is that of L. Gao et al., 2024, arXiv 2406.04093. As there, the
        auxiliary sum has no bias (the authors' code adds it). A latent is active where any value is
        not 0 (their code asks for a positive sum over the batch, which misjudges signed values).
    """

    aux_weight: Tensor
    silent_tokens: Tensor

    def __init__(
        self,
        dim: int,
        dict_size: int,
        k: int,
        *,
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 1000,
        unit_norm_decoder: bool = True,
        subtract_decoder_bias: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("dict_size", dict_size, 1)
        aux_k = min(max(dim // 2, 1), dict_size) if aux_k is None else aux_k
        for name, kept in (("k", k), ("aux_k", aux_k)):
            check_at_least(name, kept, 1)
            if kept > dict_size:
                raise ValueError(f"{name} must be at most dict_size = {dict_size}, got {kept}")
        check_at_least("dead_after", dead_after, 1)
        self.dim = dim
        self.dict_size = dict_size
        self.k = k
        self.aux_k = aux_k
        self.dead_after = dead_after
        self.unit_norm_decoder = unit_norm_decoder
        self.subtract_decoder_bias = subtract_decoder_bias
        self.process_group = process_group
        self.encoder = nn.Linear(dim, dict_size, device=device, dtype=dtype)
        self.decoder = nn.Parameter(torch.empty(dict_size, dim, device=device, dtype=dtype))
        self.decoder_bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.register_buffer(
            "silent_tokens", torch.zeros(dict_size, dtype=torch.int64, device=device)
        )
        self.schedule("aux_weight", aux_weight, check_not_negative)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random directions for the decoder, and copy them to the encoder; biases are 0."""
        nn.init.normal_(self.decoder)
        norm = 1.0 if self.unit_norm_decoder else 0.1
        self.decoder.mul_(norm / self.decoder.norm(dim=1, keepdim=True))
        self.encoder.weight.copy_(self.decoder)
        nn.init.zeros_(self.encoder.bias)
        nn.init.zeros_(self.decoder_bias)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode, select and rebuild."""
        pre = self._mean(x)
        return self._rebuild(pre, pre)

    def loss(self, x: Tensor) -> SAELoss:
        """Return the loss of a batch; in training mode also count which latents were silent."""
        return self._loss(x, self(x))

    def _mean(self, x: Tensor) -> Tensor:
        return F.relu(self._encode(self.encoder, x))

    def _encode(self, layer: nn.Linear, x: Tensor) -> Tensor:
        check_floating("x", x)
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape [*, dim = {self.dim}], got {list(x.shape)}")
        encoded: Tensor = layer(x - self.decoder_bias if self.subtract_decoder_bias else x)
        return encoded

    def _rebuild(self, pre: Tensor, scores: Tensor) -> SAEOutput:
        indices = scores.detach().topk(self.k, sorted=False).indices
        values = pre.gather(-1, indices)
        recon = self._decode(values.flatten(0, -2), indices.flatten(0, -2)) + self.decoder_bias
        return SAEOutput(recon.unflatten(0, pre.shape[:-1]), values, indices, pre)

    def _decode(self, values: Tensor, indices: Tensor) -> Tensor:
        return weighted_rows(values.to(self.decoder.dtype), indices, self.decoder)

    def _loss(
        self, x: Tensor, output: SAEOutput, divergence: Tensor | None = None, kl_weight: Any = 0.0
    ) -> SAELoss:
        """Return the loss, given the divergence of every token, ``[*]``."""
        wide = accumulate_dtype(x.dtype)
        error = (x.to(wide) - output.recon.to(wide)).flatten(0, -2)
        if self.training:
            self._count_silent(output)
        sums = [
            error.square().sum(),
            error.new_zeros(()) if divergence is None else divergence.to(wide).sum(),
            self._aux_sum(error.detach(), output.pre.flatten(0, -2)),
            error.new_full((), len(error)),
        ]
        if self.process_group is not None:
            sums = list(add_up(torch.stack(sums), self.process_group))
        recon, kl, aux = (total / sums[3].clamp_min(1) for total in sums[:3])
        weighted = (self.aux_weight * aux).to(wide)
        if divergence is None:
            return SAELoss(recon + weighted, recon, kl, aux)
        return SAELoss(recon + (kl_weight * kl).to(wide) + weighted, recon, kl, aux)

    @torch.no_grad()
    def _count_silent(self, output: SAEOutput) -> None:
        active = (output.values != 0).flatten().to(torch.int64)
        count = torch.zeros_like(self.silent_tokens).index_add_(0, output.indices.flatten(), active)
        tokens = count.new_full((1,), output.pre.shape[:-1].numel())
        if self.process_group is not None:
            together = torch.cat([count, tokens])
            dist.all_reduce(together, group=self.process_group)
            count, tokens = together[:-1], together[-1:]
        self.silent_tokens.add_(tokens).masked_fill_(count > 0, 0)

    def _aux_sum(self, error: Tensor, pre: Tensor) -> Tensor:
        """Return the sum over tokens of the auxiliary term; no gradient through ``error``."""
        dead = self.silent_tokens >= self.dead_after
        if _known_false(dead):
            return error.new_zeros(())
        # Where fewer than aux_k are dead, others fill the places with 0: no size depends on data.
        scores = pre.detach().abs().masked_fill(~dead, -1.0)
        indices = scores.topk(self.aux_k, sorted=False).indices
        values = pre.gather(-1, indices).where(dead[indices], 0.0)
        unexplained = (error - self._decode(values, indices).to(error.dtype)).square().sum()
        tokens, variance = self._variance(error)
        counts = dead.any() & (tokens > 1)
        return (unexplained / (variance + 1e-8)).where(counts, 0.0)

    def _variance(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many tokens the batch has, and the mean squared distance from their mean."""
        first = torch.cat([error.sum(0), error.new_full((1,), len(error))])
        if self.process_group is not None:
            dist.all_reduce(first, group=self.process_group)
        tokens = first[-1]
        squares = (error - first[:-1] / tokens.clamp_min(1)).square().sum()
        if self.process_group is not None:
            dist.all_reduce(squares, group=self.process_group)
        return tokens, squares / tokens.clamp_min(1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale the rows of the decoder to norm 1, in place; rows of zeros stay."""
        norm = self.decoder.norm(dim=1, keepdim=True)
        self.decoder.div_(norm.where(norm > 0, 1.0))

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take from the decoder's gradient what would only change the norm of a row, in place."""
        if self.decoder.grad is not None:
            square = self.decoder.square().sum(1, keepdim=True)
            along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
            self.decoder.grad.sub_(self.decoder * along / square.where(square > 0, 1.0))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the decoder's rows at norm 1: project its gradient before every step, scale after.

        Does nothing with ``unit_norm_decoder=False``.
        """
        if self.unit_norm_decoder:
            optimizer.register_step_pre_hook(lambda *_: self.project_gradient())
            optimizer.register_step_post_hook(lambda *_: self.normalize_decoder())

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"dim={self.dim}, dict_size={self.dict_size}, k={self.k}, aux_k={self.aux_k}"


def _known_false(flags: Tensor) -> bool:
    """Tell whether no flag is set, as far as looking costs no synchronisation."""
    if flags.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not bool(flags.any())


class VariationalTopKSAE(TopKSAE):
    r"""A :class:`TopKSAE` whose latents are Gaussian samples, drawn before the selection.

    .. math::
        \mu = \mathrm{ReLU}(W_e x + b_e), \qquad z = \mu + \sigma \odot \varepsilon, \qquad
        \hat x = \sum_{m \in \mathrm{top}_k(|z|)} z_m d_m + b_d, \qquad
        L = L_{\mathrm{SAE}} + \beta\, s\, \overline{\mathrm{KL}}

    with :math:`\mathrm{KL} = \frac12 \sum_m (\mu_m^2 + \sigma_m^2 - 1 - \log \sigma_m^2)` of a
    token. Samples keep their sign. In ``eval()`` z is :math:`\mu` and nothing is random. The factor
    s rises linearly from 0 to 1 over the first ``kl_warmup_steps`` losses of training.

    The paper's finding is negative: the divergence drives latents to silence, and the plain
    autoencoder rebuilds better, by far where there is noise. Look at :func:`dead_fraction`.

    Args:
        dim: D, features of an activation.
        dict_size: M, latents.
        k: latents kept for a token, from 1 to M.
        variance: ``"fixed"``: :math:`\sigma` is the argument; ``"learned"``: a linear function of x
            gives :math:`\log \sigma^2`; ``"none"``: no noise and :math:`\frac12 \sum_m \mu_m^2` for
            KL, which is what the authors' main run computes.
        sigma: :math:`\sigma` for ``"fixed"``, above 0; may be assigned a number at any time.
        kl_weight: :math:`\beta`, at least 0; may be assigned a number at any time. The error is a
            sum over D, so the right weight depends on D and on the scale of x; the paper's main run
            takes 0.5 for D = 512, another one 500.
        kl_warmup_steps: at least 0; the paper takes a tenth of the training.
        kl_mask: KL is a sum over ``"all"`` latents or the selected ones, ``"topk"``.
        log_var_init: where a learned :math:`\log \sigma^2` starts.
        log_var_range: the bounds it is clamped to; no gradient beyond.
        unit_norm_decoder: as in :class:`TopKSAE`; off, as in the paper: the rows have to be free to
            become short, for noise of a given size to become small beside the latents.
        **options: further ones of :class:`TopKSAE`.

    Shape:
        ``[*, D]`` to :class:`SAEOutput`; the entries of ``*`` are tokens.

    Raises:
        TypeError: an argument is of the wrong type, ``x`` not floating-point.
        ValueError: an argument is out of range, or ``x`` has other features.

    Example:
        >>> sae = VariationalTopKSAE(dim=16, dict_size=64, k=4, kl_weight=0.5)
        >>> x = torch.randn(32, 16)
        >>> bool((sae(x).features < 0).any()), bool((sae.eval()(x).features < 0).any())
        (True, False)

    Source:
        "Analysis of Variational Sparse Autoencoders", 2025, arXiv 2509.22994, authors' code read.
        The text has noise of variance 1 in training, which is the default here; the code of the
        main run adds none (``variance="none"``) and clamps :math:`\mu` at 10 inside KL, which is
        left out. Its file with the masked KL applies no ReLU to :math:`\mu`; here there always is.
    """

    sigma: Tensor
    kl_weight: Tensor
    kl_steps: Tensor
    log_variance: nn.Linear | None

    def __init__(
        self,
        dim: int,
        dict_size: int,
        k: int,
        *,
        variance: Variance = "fixed",
        sigma: float = 1.0,
        kl_weight: float = 0.5,
        kl_warmup_steps: int = 0,
        kl_mask: KLMask = "all",
        log_var_init: float = -2.0,
        log_var_range: tuple[float, float] = (-6.0, 2.0),
        unit_norm_decoder: bool = False,
        **options: Any,
    ) -> None:
        check_one_of("variance", variance, ("fixed", "learned", "none"))
        check_one_of("kl_mask", kl_mask, ("all", "topk"))
        check_at_least("kl_warmup_steps", kl_warmup_steps, 0)
        least, most = log_var_range
        if not -math.inf < least < most < math.inf:
            raise ValueError(f"log_var_range must be finite and rising, got {log_var_range}")
        if not least <= log_var_init <= most:
            raise ValueError(f"log_var_init must lie in {log_var_range}, got {log_var_init}")
        super().__init__(dim, dict_size, k, unit_norm_decoder=unit_norm_decoder, **options)
        self.variance = variance
        self.kl_warmup_steps = kl_warmup_steps
        self.kl_mask = kl_mask
        self.log_var_range = (least, most)
        self.log_variance = None
        if variance == "learned":
            like = self.decoder
            self.log_variance = nn.Linear(dim, dict_size, device=like.device, dtype=like.dtype)
            nn.init.zeros_(self.log_variance.weight)
            nn.init.constant_(self.log_variance.bias, log_var_init)
        steps = torch.zeros((), dtype=torch.int64, device=self.decoder.device)
        self.register_buffer("kl_steps", steps)
        self.schedule("sigma", sigma, check_positive)
        self.schedule("kl_weight", kl_weight, check_not_negative)

    def forward(
        self, x: Tensor, *, sample: bool | None = None, generator: torch.Generator | None = None
    ) -> SAEOutput:
        """Encode, draw, select and rebuild.

        Args:
            x: ``[*, D]``.
            sample: whether to draw; None: in training. Never with ``variance="none"``.
            generator: of the draw, on the device of ``x``.
        """
        return self._sampled(x, sample, generator)[0]

    def loss(self, x: Tensor, *, generator: torch.Generator | None = None) -> SAELoss:
        """Return the loss of a batch.

        In training mode also count which latents were silent, and the steps of the warm-up.
        """
        output, mean, log_variance = self._sampled(x, None, generator)
        if self.kl_mask == "topk":
            mean = mean.gather(-1, output.indices)
            log_variance = log_variance.expand_as(output.pre).gather(-1, output.indices)
        wide = accumulate_dtype(x.dtype)
        components = kl_standard_normal(mean.to(wide), log_variance=log_variance.to(wide))
        weight = self.kl_weight
        if self.kl_warmup_steps > 0:
            weight = weight * (self.kl_steps / self.kl_warmup_steps).clamp_max(1.0)
        if self.training:
            self.kl_steps.add_(1)
        return self._loss(x, output, components.sum(-1), weight)

    def _sampled(
        self, x: Tensor, sample: bool | None, generator: torch.Generator | None
    ) -> tuple[SAEOutput, Tensor, Tensor]:
        """Return the output, the means and the logarithms of the variance, expandable to them."""
        mean = self._mean(x)
        log_variance = self._log_variance(x, mean)
        sample = self.training if sample is None else sample
        if not sample or self.variance == "none":
            return self._rebuild(mean, mean), mean, log_variance
        if generator is not None:
            check_caller_draws(generator)
        drawn = reparameterize(mean, (0.5 * log_variance).exp(), generator=generator)
        return self._rebuild(drawn, drawn.abs()), mean, log_variance

    def _log_variance(self, x: Tensor, mean: Tensor) -> Tensor:
        if self.log_variance is not None:
            return self._encode(self.log_variance, x).clamp(*self.log_var_range)
        if self.variance == "none":
            return mean.new_zeros(())
        return (2 * self.sigma.log()).to(mean)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"{super().extra_repr()}, variance={self.variance!r}, "
            f"kl_weight={self.kl_weight.item():g}, kl_mask={self.kl_mask!r}"
        )


def dead_fraction(sae: TopKSAE) -> float:
    r"""Return the share of latents that were silent for the last ``dead_after`` training tokens.

    .. math:: \frac1M \sum_m [\mathrm{silent}_m \ge \mathrm{dead\_after}]

    Args:
        sae: the autoencoder; it counts in :meth:`TopKSAE.loss` in training mode.

    Returns:
        A number in [0, 1].

    Raises:
        TypeError: ``sae`` is no :class:`TopKSAE`.

    Example:
        >>> sae = TopKSAE(dim=8, dict_size=32, k=2, dead_after=100)
        >>> _ = sae.loss(torch.ones(100, 8))  # equal tokens: the same 2 of 32 latents each time
        >>> dead_fraction(sae)
        0.9375

    Source:
        A figure of the paper, 2025, arXiv 2509.22994, counted as in its code.
    """
    if not isinstance(sae, TopKSAE):
        raise TypeError(f"sae must be a TopKSAE, got {type(sae).__name__}")
    return (sae.silent_tokens >= sae.dead_after).double().mean().item()
