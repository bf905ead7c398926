//! mica-vmm.
