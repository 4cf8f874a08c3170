"""The tree of draft tokens: who follows whom, and who may attend to whom."""

import logging

import torch

from sgl_kernel._checks import check_index, check_matrix, check_room

logger = logging.getLogger(__name__)

FULL_MASK, QLEN_ONLY, QLEN_ONLY_BITPACKING = 0, 1, 2

# Marks a node whose parent is not among the selected tokens (log-probabilities that are NaN lead to it).
_ORPHAN = -1


def build_tree_kernel_efficient_cpu(
    group_parents,
    selected,
    seq_lens,
    mask_out,
    positions_out,
    index_out,
    first_child_out,
    next_sibling_out,
    topk,
    depth,
    nodes,
    mask_mode,
):
    """Link each request's selected draft tokens into a tree and write its attention mask.

    Node 0 is the last committed token, nodes 1 to ``nodes`` - 1 the selected draft tokens. A draft token numbered s
    stands in group s // topk; those of group 0 are children of node 0, the parent of group g is the draft token
    numbered ``group_parents[g]``. A node whose parent was not selected gets no links. Callers pass all arguments by
    position.

    Args:
        group_parents: [batch, topk * (depth - 1) + 1] int, or no columns where ``depth`` is 1.
        selected: [batch, nodes - 1] int, the numbers of the selected tokens.
        seq_lens: [batch] int, tokens committed before node 0.
        mask_out: flat, written in place. FULL_MASK (0): for each request ``nodes`` rows of seq_len + nodes elements,
            the last ``nodes`` of each row written; QLEN_ONLY (1): rows of ``nodes`` elements; QLEN_ONLY_BITPACKING
            (2): one bit set of 1, 2 or 4 bytes per node, the first node in the lowest bit. A row is true at the node
            itself and its ancestors.
        positions_out: [batch * nodes] int, seq_len + depth of the node.
        index_out: [batch, nodes] int, the node's index in the whole batch.
        first_child_out: [batch, nodes] int, -1 where the node has no child.
        next_sibling_out: [batch, nodes] int, the next child of the same parent, -1 where there is none.
        topk, depth, nodes: shape of the draft.
        mask_mode: one of the three above.

    Raises:
        ValueError: shapes do not fit, the mode is unknown, or bit sets of more than 32 nodes are asked for.
    """
    lengths = check_index("seq_lens", seq_lens)
    batch = lengths.numel()
    check_matrix("group_parents", group_parents, rows=batch)
    check_matrix("selected", selected, rows=batch, columns=nodes - 1)
    links = {"index_out": index_out, "first_child_out": first_child_out, "next_sibling_out": next_sibling_out}
    for name, tensor in links.items():
        check_matrix(name, tensor, rows=batch, columns=nodes)

    parents = _parents(group_parents.long(), selected.long(), topk)
    ancestors, depths = _ancestors(parents)
    positions = check_room("positions_out", positions_out, batch * nodes)
    positions[: batch * nodes] = (depths + lengths.unsqueeze(1)).to(positions.dtype).flatten()
    index_out.copy_(torch.arange(batch * nodes).view(batch, nodes))
    first_child, next_sibling = _links(parents)
    first_child_out.copy_(first_child)
    next_sibling_out.copy_(next_sibling)
    _write_mask(mask_out, ancestors, lengths, int(mask_mode))


def _parents(group_parents, selected, topk):
    """[batch, nodes] node number of each node's parent; node 0 is its own."""
    batch, drafts = selected.shape
    group = selected // topk
    parents = torch.zeros((batch, drafts + 1), dtype=torch.int64)
    if not bool((group > 0).any()):
        return parents
    if int(group.max()) >= group_parents.shape[1]:
        raise ValueError(f"selected names group {int(group.max())} of {group_parents.shape[1]} in group_parents")
    parent_number = group_parents.gather(1, group)
    matches = selected.unsqueeze(1) == parent_number.unsqueeze(2)
    # argmax of 0/1 gives the first match; a row without any is an orphan.
    found = matches.any(2)
    node = torch.where(found, matches.int().argmax(2) + 1, _ORPHAN)
    parents[:, 1:] = torch.where(group == 0, 0, node)
    orphans = int((parents == _ORPHAN).sum())
    if orphans:
        logger.warning("%d draft tokens have no selected parent and are left out of the tree", orphans)
    return parents


def _ancestors(parents):
    """Boolean [batch, node, ancestor or self] with column 0 always true, and each node's depth."""
    batch, nodes = parents.shape
    ancestors = torch.zeros((batch, nodes, nodes), dtype=torch.bool)
    depths = torch.zeros((batch, nodes), dtype=torch.int64)
    current = torch.arange(nodes).repeat(batch, 1)
    # A path has at most nodes - 1 edges; the bound also ends a walk in a list that is not a tree.
    for _ in range(nodes - 1):
        walking = current > 0
        if not bool(walking.any()):
            break
        depths += walking
        here = current.clamp(min=0)
        ancestors.scatter_(2, here.unsqueeze(2), ancestors.gather(2, here.unsqueeze(2)) | walking.unsqueeze(2))
        current = torch.where(walking, parents.gather(1, here), current)
    ancestors[:, :, 0] = True
    return ancestors, depths


def _links(parents):
    """First child of each node and next sibling of each node, -1 where there is none."""
    _, nodes = parents.shape
    children = torch.arange(nodes)
    is_child = (children > 0) & (parents != _ORPHAN)
    none = nodes
    # of_parent[b, p, c]: c is a child of p. The smallest such c is the first child.
    of_parent = (parents.unsqueeze(1) == children.view(1, nodes, 1)) & is_child.unsqueeze(1)
    first_child = torch.where(of_parent, children, none).amin(2)
    siblings = (parents.unsqueeze(2) == parents.unsqueeze(1)) & is_child.unsqueeze(1) & is_child.unsqueeze(2)
    later = children.view(1, nodes) > children.view(nodes, 1)
    next_sibling = torch.where(siblings & later, children, none).amin(2)
    return first_child.masked_fill(first_child == none, -1), next_sibling.masked_fill(next_sibling == none, -1)


def _write_mask(mask_out, ancestors, seq_lens, mode):
    """Write the batch's rows into the flat mask in the layout of ``mode``."""
    batch, nodes, _ = ancestors.shape
    if mode == FULL_MASK:
        row_lens = seq_lens + nodes
        first = torch.cumsum(row_lens, 0) - row_lens
        mask = check_room("mask_out", mask_out, int(row_lens.sum()) * nodes)
        node = torch.arange(nodes)
        cells = (first * nodes + seq_lens).view(-1, 1, 1) + row_lens.view(-1, 1, 1) * node.view(1, -1, 1) + node
        mask[cells.flatten()] = ancestors.flatten().to(mask.dtype)
    elif mode == QLEN_ONLY:
        mask = check_room("mask_out", mask_out, batch * nodes * nodes)
        mask[: batch * nodes * nodes] = ancestors.flatten().to(mask.dtype)
    elif mode == QLEN_ONLY_BITPACKING:
        if nodes > 32:
            raise ValueError(f"a bit set holds at most 32 nodes, not {nodes}")
        item = 1 if nodes <= 8 else 2 if nodes <= 16 else 4
        bits = torch.zeros((batch, nodes, item * 8), dtype=torch.int32)
        bits[:, :, :nodes] = ancestors
        packed = (bits.view(batch, nodes, item, 8) << torch.arange(8, dtype=torch.int32)).sum(-1).to(torch.uint8)
        raw = check_room("mask_out", mask_out, 0).view(torch.uint8)
        check_room("mask_out's bytes", raw, packed.numel())[: packed.numel()] = packed.flatten()
    else:
        raise ValueError(f"mask_mode {mode} is not one of 0, 1, 2")
