"""Read, write and verify caches of a teacher's sparse lens targets. Needs neither torch nor transformers."""

from distilllens_cache.cache_folder import CacheFolder, open_folder
from distilllens_cache.canary import CanaryResult, canary
from distilllens_cache.codec import CODECS, Codec
from distilllens_cache.errors import CacheError
from distilllens_cache.identity import READER_FIELDS, Identity, TokenizerIdentity, compare_identity
from distilllens_cache.layout import FORMAT_VERSION
from distilllens_cache.lock import ALONE, Seat, WriterLock, holding, require_free
from distilllens_cache.manifest import FileRecord, LayerStats, Manifest, ShardRecord, SketchRecord
from distilllens_cache.order import WINDOW_SHARDS, Order
from distilllens_cache.plan import plan_shards, share_shards
from distilllens_cache.read_ahead import ReadAhead
from distilllens_cache.reader import CacheReader
from distilllens_cache.repair import restore_plan
from distilllens_cache.resume import bytes_of, cut_of, require_writable
from distilllens_cache.sketch import Projection, Sketch
from distilllens_cache.spool import Spool
from distilllens_cache.stream import CacheStream
from distilllens_cache.tail_spec import SketchSpec, TailSpec, parse_tail_spec
from distilllens_cache.tail_sums import FIXED_POINT, tail_profile
from distilllens_cache.targets import (
    LOG_FLOOR,
    CachedExample,
    LayerTargets,
    PlannedExample,
    TailSamples,
    example_digest,
)
from distilllens_cache.verify import Problem, VerifyReport, verify_cache
from distilllens_cache.writer import CacheWriter

__all__ = [
    "ALONE",
    "CODECS",
    "FIXED_POINT",
    "FORMAT_VERSION",
    "LOG_FLOOR",
    "READER_FIELDS",
    "WINDOW_SHARDS",
    "CacheError",
    "CacheFolder",
    "CacheReader",
    "CacheStream",
    "CacheWriter",
    "CachedExample",
    "CanaryResult",
    "Codec",
    "FileRecord",
    "Identity",
    "LayerStats",
    "LayerTargets",
    "Manifest",
    "Order",
    "PlannedExample",
    "Problem",
    "Projection",
    "ReadAhead",
    "Seat",
    "ShardRecord",
    "Sketch",
    "SketchRecord",
    "SketchSpec",
    "Spool",
    "TailSamples",
    "TailSpec",
    "TokenizerIdentity",
    "VerifyReport",
    "WriterLock",
    "bytes_of",
    "canary",
    "compare_identity",
    "cut_of",
    "example_digest",
    "holding",
    "open_folder",
    "parse_tail_spec",
    "plan_shards",
    "require_free",
    "require_writable",
    "restore_plan",
    "share_shards",
    "tail_profile",
    "verify_cache",
]
