"""The behaviour of a transport, as tests. Every engine passes them; an engine from elsewhere shows with them that it fits.

Example:
    ```python
    from edgeserve.testing.transport import TransportContract

    class TestMine(TransportContract):
        @pytest.fixture
        def url(self, tmp_path):
            return f"mine://{tmp_path}"
    ```
"""

from edgeserve.testing.transport.cases import TransportCases, drain, frames_of, publish
from edgeserve.testing.transport.groups import GroupCases
from edgeserve.testing.transport.limits import LimitCases
from edgeserve.testing.transport.messages import MessageCases
from edgeserve.testing.transport.names import NameCases
from edgeserve.testing.transport.redelivery import RedeliveryCases
from edgeserve.testing.transport.settling import SettlingCases


class TransportContract(MessageCases, GroupCases, RedeliveryCases, SettlingCases, LimitCases, NameCases):
    """All cases. A subclass named `Test...` supplies the fixture `url`: the node URL of an engine with nothing in it yet."""


__all__ = (
    "GroupCases",
    "LimitCases",
    "MessageCases",
    "NameCases",
    "RedeliveryCases",
    "SettlingCases",
    "TransportCases",
    "TransportContract",
    "drain",
    "frames_of",
    "publish",
)
