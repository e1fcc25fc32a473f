"""What every room knows: messages and their frames, values as payloads, errors, time and counters."""

from edgeserve.core.clock import Clock, SystemClock
from edgeserve.core.codec import FORMAT_VERSION, Buffer, check_source_id, decode_frame, encode_frame
from edgeserve.core.message import (
    SOURCE_ID_MAX_BYTES,
    WATERMARK_END,
    Header,
    Key,
    Kind,
    TimeKind,
    message_id,
    replayable_id,
    result_id,
    set_id,
)
from edgeserve.core.metrics import Counters, Reason
from edgeserve.core.payload import PayloadDecoder, decode_value, decoder_for, encode_value

__all__ = (
    "FORMAT_VERSION",
    "SOURCE_ID_MAX_BYTES",
    "WATERMARK_END",
    "Buffer",
    "Clock",
    "Counters",
    "Header",
    "Key",
    "Kind",
    "PayloadDecoder",
    "Reason",
    "SystemClock",
    "TimeKind",
    "check_source_id",
    "decode_frame",
    "decode_value",
    "decoder_for",
    "encode_frame",
    "encode_value",
    "message_id",
    "replayable_id",
    "result_id",
    "set_id",
)
