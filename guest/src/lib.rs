//! mica-guest.
