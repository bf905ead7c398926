//! mica-numa.
