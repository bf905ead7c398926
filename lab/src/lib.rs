//! mica-lab.
