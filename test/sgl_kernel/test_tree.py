"""Draft trees built and verified, against walks over a tree of plain Python lists."""

import logging

import pytest
import torch

from sgl_kernel import build_tree_kernel_efficient_cpu, verify_tree_greedy_cpu

FULL_MASK, QLEN_ONLY, BITS = 0, 1, 2


def draft(seed, batch, topk, depth, nodes):
    """A draft as the beam makes it: group g > 0 holds the children of the token numbered parent_list[g]."""
    generator = torch.Generator().manual_seed(seed)

    def pick(population, count):
        return [population[i] for i in torch.randperm(len(population), generator=generator)[:count].tolist()]

    lists, selections = [], []
    for _ in range(batch):
        parents, level = [-1], list(range(topk))
        for _ in range(depth - 1):
            chosen = sorted(pick(level, topk))
            first = len(parents)
            parents += chosen
            level = [group * topk + i for group in range(first, first + topk) for i in range(topk)]
        total = topk * len(parents)
        selected = set()
        # A token may be selected only with its ancestors, as scores that fall along a path ensure.
        for number in pick(list(range(total)), total):
            path = {number}
            while number // topk:
                number = parents[number // topk]
                path.add(number)
            if len(selected | path) < nodes:
                selected |= path
        assert len(selected) == nodes - 1
        lists.append(parents)
        selections.append(sorted(selected))
    width = 0 if depth == 1 else topk * (depth - 1) + 1
    return torch.tensor([row[:width] for row in lists]).view(batch, width), torch.tensor(selections)


def parents_by_walk(parents, selected, topk):
    """Parent node of each node 1 to n - 1."""
    return [0 if s // topk == 0 else selected.index(parents[s // topk]) + 1 for s in selected]


def build(parent_list, selected, seq_lens, tree_mask, topk, depth, nodes, mode):
    batch = len(seq_lens)
    positions = torch.empty(batch * nodes, dtype=torch.int64)
    links = [torch.full((batch, nodes), -1) for _ in range(3)]
    build_tree_kernel_efficient_cpu(
        parent_list, selected, torch.tensor(seq_lens), tree_mask, positions, *links, topk, depth, nodes, mode
    )
    return positions, links


SHAPES = [(1, 1, 1, 2), (3, 4, 1, 4), (2, 1, 5, 6), (3, 4, 3, 12), (4, 2, 4, 7), (2, 3, 4, 20)]


@pytest.mark.parametrize("batch, topk, depth, nodes", SHAPES)
@pytest.mark.parametrize("mode", [FULL_MASK, QLEN_ONLY, BITS])
def test_links_positions_and_mask(batch, topk, depth, nodes, mode):
    parent_list, selected = draft(batch + nodes, batch, topk, depth, nodes)
    seq_lens = [3 + 2 * i for i in range(batch)]
    if mode == FULL_MASK:
        tree_mask = torch.ones(sum(nodes * (length + nodes) for length in seq_lens), dtype=torch.bool)
    elif mode == QLEN_ONLY:
        tree_mask = torch.ones(batch * nodes * nodes, dtype=torch.bool)
    else:
        dtype = torch.uint8 if nodes <= 8 else torch.uint16 if nodes <= 16 else torch.uint32
        tree_mask = torch.zeros(batch * nodes, dtype=dtype)
    positions, (index, child, sibling) = build(parent_list, selected, seq_lens, tree_mask, topk, depth, nodes, mode)

    assert index.flatten().tolist() == list(range(batch * nodes))
    cell = 0
    for b, length in enumerate(seq_lens):
        parent = [None, *parents_by_walk(parent_list[b].tolist(), selected[b].tolist(), topk)]
        for node in range(nodes):
            children = [n for n in range(1, nodes) if parent[n] == node]
            assert int(child[b, node]) == (children[0] if children else -1)
            later = [n for n in range(node + 1, nodes) if node and parent[n] == parent[node]]
            assert int(sibling[b, node]) == (later[0] if later else -1)
            path, walk = {0, node}, node
            while walk:
                walk = parent[walk]
                path.add(walk)
            assert int(positions[b * nodes + node]) == length + len(path) - 1
            if mode == BITS:
                assert int(tree_mask[b * nodes + node]) == sum(1 << n for n in path)
                continue
            prefix = length if mode == FULL_MASK else 0
            row = tree_mask[cell : cell + prefix + nodes].tolist()
            assert row == [True] * prefix + [n in path for n in range(nodes)]
            cell += prefix + nodes


def test_an_orphan_is_left_out_with_a_warning(caplog):
    # Token 5 stands in group 2, whose parent, token 1, is not selected.
    parent_list, selected = torch.tensor([[-1, 0, 1]]), torch.tensor([[0, 5]])
    tree_mask = torch.ones(9, dtype=torch.bool)
    with caplog.at_level(logging.WARNING):
        _, (_, child, sibling) = build(parent_list, selected, [4], tree_mask, 2, 2, 3, QLEN_ONLY)
    assert "1 draft tokens have no selected parent" in caplog.text
    assert child.tolist() == [[1, -1, -1]]
    assert sibling.tolist() == [[-1, -1, -1]]


def test_an_unknown_mode_is_refused():
    parent_list, selected = draft(0, 1, 1, 1, 2)
    with pytest.raises(ValueError, match="mask_mode 7"):
        build(parent_list, selected, [1], torch.ones(4), 1, 1, 2, 7)


def test_bit_sets_hold_no_more_than_32_nodes():
    parent_list, selected = draft(0, 1, 40, 1, 40)
    with pytest.raises(ValueError, match="at most 32 nodes"):
        build(parent_list, selected, [1], torch.zeros(40, dtype=torch.uint32), 40, 1, 40, BITS)


@pytest.mark.parametrize("batch, topk, depth, nodes", SHAPES)
@pytest.mark.parametrize("vocab", [1, 2, 5])
def test_verification_follows_the_targets_choices(batch, topk, depth, nodes, vocab):
    parent_list, selected = draft(nodes, batch, topk, depth, nodes)
    tree_mask = torch.ones(batch * nodes * nodes, dtype=torch.bool)
    _, links = build(parent_list, selected, [1] * batch, tree_mask, topk, depth, nodes, QLEN_ONLY)
    # A small vocabulary makes long accepted paths and siblings that hold the same token.
    generator = torch.Generator().manual_seed(vocab)
    tokens = torch.randint(0, vocab, (batch, nodes), generator=generator)
    target = torch.randint(0, vocab, (batch, nodes), generator=generator)
    predicts = torch.full((batch * nodes,), -9, dtype=torch.int32)
    accept_index = torch.full((batch, depth + 1), -1, dtype=torch.int32)
    accepted = torch.zeros(batch, dtype=torch.int32)
    verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accept_index,
        accept_token_num=accepted,
        candidates=tokens,
        retrive_index=links[0],
        retrive_next_token=links[1],
        retrive_next_sibling=links[2],
        target_predict=target,
    )

    expected_predicts = [-9] * (batch * nodes)
    for b in range(batch):
        parent = [None, *parents_by_walk(parent_list[b].tolist(), selected[b].tolist(), topk)]
        path = [0]
        while len(path) < depth + 1:
            wanted = int(target[b, path[-1]])
            matches = [n for n in range(1, nodes) if parent[n] == path[-1] and int(tokens[b, n]) == wanted]
            if not matches:
                break
            path.append(matches[0])
        for node in path:
            expected_predicts[b * nodes + node] = int(target[b, node])
        assert int(accepted[b]) == len(path) - 1
        assert accept_index[b].tolist() == [b * nodes + n for n in path] + [-1] * (depth + 1 - len(path))
    assert predicts.tolist() == expected_predicts


def test_verification_refuses_links_of_another_shape():
    names = ("candidates", "target_predict", "retrive_index", "retrive_next_sibling", "accept_index", "predicts")
    pair = {name: torch.zeros(1, 2).long() for name in names}
    with pytest.raises(ValueError, match="retrive_next_token must have 2 columns"):
        verify_tree_greedy_cpu(
            **pair, retrive_next_token=torch.zeros(1, 3).long(), accept_token_num=torch.zeros(1).long()
        )
