//! mica-shards.
