"""Greedy verification of a tree of draft tokens."""

import torch

from sgl_kernel._checks import check_index, check_matrix, check_room


def verify_tree_greedy_cpu(
    *,
    candidates,
    target_predict,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    accept_index,
    accept_token_num,
    predicts,
):
    """Follow each request's draft tree along the tokens that the target model itself would choose.

    From a node the walk goes to the first child whose token equals the target's choice at that node, and ends where
    no child does or ``accept_index`` is full. The names are those that callers use, so all are by keyword.

    Args:
        candidates: [batch, n] int, the tokens of the nodes.
        target_predict: [batch, n] int, the target's choice at each node.
        retrive_index, retrive_next_token, retrive_next_sibling: [batch, n] int, the tree as
            ``build_tree_kernel_efficient_cpu`` writes it: index in the batch, first child, next sibling.
        accept_index: [batch, steps] int, written in place: batch-wide indices of the nodes visited, node 0 first;
            what is beyond them stays as it was.
        accept_token_num: [batch] int, written in place: draft tokens accepted, node 0 not counted.
        predicts: [batch * n] int, written in place at every node visited: the target's choice there.

    Raises:
        ValueError: shapes do not fit.
    """
    batch, nodes = check_matrix("candidates", candidates).shape
    steps = check_matrix("accept_index", accept_index, rows=batch).shape[1]
    named = {
        "retrive_index": retrive_index,
        "retrive_next_token": retrive_next_token,
        "retrive_next_sibling": retrive_next_sibling,
        "target_predict": target_predict,
    }
    for name, tensor in named.items():
        check_matrix(name, tensor, rows=batch, columns=nodes)
    check_index("accept_token_num", accept_token_num, batch)
    flat_predicts = check_room("predicts", predicts, batch * nodes)
    targets = target_predict.reshape(-1)

    rows = torch.arange(batch)
    node = torch.zeros(batch, dtype=torch.int64)
    last = retrive_index[:, 0].long()
    accepted = torch.zeros(batch, dtype=torch.int64)
    accept_index[:, 0] = last.to(accept_index.dtype)
    for _ in range(1, steps):
        child = _matching_child(rows, node, targets[last], candidates, retrive_next_token, retrive_next_sibling)
        going = child >= 0
        # A request that stopped keeps node, and its search from there fails again: no mask of its own is needed.
        if not bool(going.any()):
            break
        flat_predicts[last[going]] = targets[last[going]].to(flat_predicts.dtype)
        node = torch.where(going, child, node)
        last = torch.where(going, retrive_index[rows, node].long(), last)
        accepted += going
        accept_index[rows[going], accepted[going]] = last[going].to(accept_index.dtype)
    accept_token_num.copy_(accepted)
    flat_predicts[last] = targets[last].to(flat_predicts.dtype)


def _matching_child(rows, node, wanted, candidates, next_token, next_sibling):
    """The first child of each request's node that holds the wanted token, -1 where none does."""
    child = next_token[rows, node].long()
    # There are at most as many siblings as nodes; the bound also ends a walk in links that form a circle.
    for _ in range(candidates.shape[1]):
        here = child.clamp(min=0)
        searching = (child >= 0) & (candidates[rows, here] != wanted)
        if not bool(searching.any()):
            break
        child = torch.where(searching, next_sibling[rows, here].long(), child)
    return child
