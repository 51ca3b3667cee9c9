"""The public Petals network: its bootstrap peers and a notice for its users."""

from __future__ import annotations

from collections.abc import Sequence

PUBLIC_INITIAL_PEERS = (
    "/dns/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns6/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/ip4/159.89.214.152/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/dns6/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/ip4/159.203.156.48/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
)
"""The network's bootstrap peers."""

PUBLIC_NOTICE = (
    "the public Petals network: the hidden states of your texts go to machines of strangers, who could read them. "
    "For data that must not leave your machines use a swarm of your own"
)


def is_public(initial_peers: Sequence[str]) -> bool:
    """Whether all of these peers are bootstrap peers of the public network; False if there are none."""
    return bool(initial_peers) and set(initial_peers) <= set(PUBLIC_INITIAL_PEERS)
