"""Of many places at once, which lie in which: what `overlap.relation` says of two, without asking it of all pairs."""

from collections.abc import Hashable, Iterator, Sequence

from tidemill.storage.overlap import LocalPlace, Relation


def crowded(inboxes: Sequence[str], others: Sequence[str]) -> Iterator[tuple[str, Relation, str]]:
    """Each (inbox, how it lies to the place, place) that do not lie apart; some more than once.

    Args:
        inboxes: URLs of stores, each once. Two of them may not overlap either.
        others: URLs of stores of other places. They may lie in each other.
    """
    trails = {url: _trail(url) for url in (*inboxes, *others)}
    named: dict[Hashable, list[str]] = {}
    for url in trails:
        named.setdefault(trails[url][0], []).append(url)
    watched = set(inboxes)
    both = watched & set(others)
    for url, (own, within) in trails.items():
        for place in within:
            for outer in named.get(place, ()):
                if outer == url and url not in both:
                    continue  # itself
                lies = Relation.SAME if place == own else Relation.INSIDE
                if url in watched:
                    yield url, lies, outer
                if outer in watched and outer != url:
                    yield outer, Relation.SAME if lies is Relation.SAME else Relation.HOLDS, url


def _trail(url: str) -> tuple[Hashable, frozenset[Hashable]]:
    """(what a place is, that and all that it lies in): one place is or lies inside another whose name is in its trail."""
    scheme, _, path = url.partition("://")
    if scheme == "file":
        local = LocalPlace.at(path)
        above = {(folder, ()) for folder in local.above}
        new = [(local.nearest, local.missing[:count]) for count in range(len(local.missing) + 1)]
        return new[-1], frozenset((*above, *new))
    names = path.rstrip("/").split("/")
    return (scheme, *names), frozenset((scheme, *names[:count]) for count in range(1, len(names) + 1))
