"""Join policies: which messages of several sources belong together. Pure decisions, without I/O or a clock of their own."""

from edgeserve.align.base import JoinSet, Member, Policy, Released, SourceReport, SpreadRefused
from edgeserve.align.exact import Exact
from edgeserve.align.keyed import ByKey
from edgeserve.align.latest import Latest
from edgeserve.align.own import Adapted, OwnPolicy
from edgeserve.align.resolve import make_policy, makes_policies

__all__ = (
    "Adapted",
    "ByKey",
    "Exact",
    "JoinSet",
    "Latest",
    "Member",
    "OwnPolicy",
    "Policy",
    "Released",
    "SourceReport",
    "SpreadRefused",
    "make_policy",
    "makes_policies",
)
