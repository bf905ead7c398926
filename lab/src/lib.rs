//! mica-lab.

pub mod one_vm;
pub mod tiny_guest;
