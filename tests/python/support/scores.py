"""SNP's scores by their definition (Shim et al., ECCV 2024), written without secateur."""

from __future__ import annotations

import torch


def literal_scores(q, k, gamma):
    """ω of every image and head (B, H, d) from the map's SVD, and whether it is well defined there (B, H)."""
    q, k = (x.double().transpose(1, 2) for x in (q, k))
    limit = min(gamma, *q.shape[2:])
    u, s, vh = torch.linalg.svd(q @ k.mT)
    u, vh = u[..., :limit], vh[..., :limit, :]
    left, right = (u.mT @ q).abs(), (vh @ k).abs()
    norms = q.norm(dim=2) * k.norm(dim=2)
    counted = s[..., :limit] > 1e-7 * s[..., :1]
    scores = (left * right * counted[..., None]).sum(2) / norms.where(norms > 0, torch.inf)
    following = torch.nn.functional.pad(s, (0, 1))[..., 1 : limit + 1]
    tied = counted & (s[..., :limit] - following < 1e-5 * s[..., :limit])
    return scores, ~tied.any(-1)


def mean_scores(q, k, gamma):
    """The mean over images, (H, d) in NumPy."""
    return literal_scores(torch.as_tensor(q), torch.as_tensor(k), gamma)[0].mean(0).numpy()


def queries_and_keys(model, x):
    """What each block's attention sees, read by plain hooks: a list of (q, k), each (B, N, H, d)."""
    seen = []

    def on_qkv(module, args, output, attn):
        q, k, _ = output.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
        seen.append([attn.q_norm(q), attn.k_norm(k)])

    handles = [
        block.attn.qkv.register_forward_hook(lambda m, a, o, attn=block.attn: on_qkv(m, a, o, attn))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen
