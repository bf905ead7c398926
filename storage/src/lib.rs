//! mica-storage.
