"""Keywords as trees: the same containers with other leaves, and every leaf by its name."""

from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType

from fastdiff.sampling.keywords import leaves, mapped, rebuilt

Pair = namedtuple("Pair", "first second")


def test_leaves_by_name():
    tree = {"b": [1, (2,)], "a": Pair(3, {}), 5: "text"}
    found = list(leaves("k", tree))
    assert [(name, value) for name, value in found if not isinstance(value, tuple)] == [
        ("k[5]", "text"), ("k['a'][0]", 3), ("k['b'][0]", 1), ("k['b'][1][0]", 2),
    ]  # fmt: skip
    assert ("k['a'][1]", (dict, 0)) in found  # an empty container is told from none, and from one of another class
    assert ("k['a']", (Pair, 2)) in found
    assert list(leaves("k", {"b": [1]})) != list(leaves("k", {"b": (1,)}))
    assert list(leaves("k", {"b": 1, "a": 2})) == list(leaves("k", {"a": 2, "b": 1}))


def test_the_same_containers_with_other_leaves():
    tree = {"a": Pair([1, 2], (3,)), "b": OrderedDict(c=4), "d": UserDict(e=5), "f": "text"}
    double = mapped(tree, lambda leaf: leaf * 2)
    assert double == {"a": Pair([2, 4], (6,)), "b": OrderedDict(c=8), "d": UserDict(e=10), "f": "texttext"}
    assert [type(double[key]) for key in "abd"] == [Pair, OrderedDict, UserDict]
    assert type(double["a"].first) is list
    assert tree["a"].first == [1, 2]
    assert mapped(MappingProxyType({"a": 1}), str) == {"a": "1"}


class Fixed(dict):
    """A mapping that is not made of a dict."""

    def __init__(self):
        super().__init__(a=1)


def test_a_mapping_that_cannot_be_made_again_is_a_dict():
    assert rebuilt(Fixed(), [7]) == {"a": 7}
