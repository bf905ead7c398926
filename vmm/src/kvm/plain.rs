//! Structures of the KVM interface as bytes and back.
//!
//! Called by `state`. Refuses every type that is not listed here.

use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

/// A structure of the kernel's interface in which every byte counts and any bytes are a value.
///
/// # Safety
/// The type has no padding, and every bit pattern of its size is one of its values.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: 18 words.
unsafe impl Plain for kvm_regs {}
// SAFETY: the kernel names all padding in it as fields; numbers throughout.
unsafe impl Plain for kvm_sregs {}
// SAFETY: two 32-bit numbers, 16 times two 32-bit numbers and a word, 16 words.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: 16 words.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: 1024 bytes.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: 56 bytes of bytes and aligned 32-bit numbers without a gap (the size below says so), and a
// word.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: two 32-bit numbers and a union, one of whose members is 512 bytes, its whole size.
unsafe impl Plain for kvm_irqchip {}

const _: () = assert!(size_of::<kvm_regs>() == 18 * 8);
// 8 segments of 24 bytes, 2 tables of 16, 7 words, 4 words of pending interrupts.
const _: () = assert!(size_of::<kvm_sregs>() == 8 * 24 + 2 * 16 + 7 * 8 + 4 * 8);
const _: () = assert!(size_of::<kvm_xcrs>() == 8 + 16 * 16 + 16 * 8);
const _: () = assert!(size_of::<kvm_debugregs>() == 16 * 8);
const _: () = assert!(size_of::<kvm_vcpu_events>() == 8 + 5 * 4 + 1 + 26 + 1 + 8);
const _: () = assert!(size_of::<kvm_irqchip>() == 8 + 512);

/// The bytes of a structure. `N` must be its size.
pub(super) fn to_bytes<T: Plain, const N: usize>(value: &T) -> [u8; N] {
    const { assert!(size_of::<T>() == N) };
    // SAFETY: `T` is `Plain`, so each of its N bytes is initialised, and any bytes are a `[u8; N]`.
    unsafe { std::mem::transmute_copy(value) }
}

/// The structure that these bytes are. `N` must be its size.
pub(super) fn from_bytes<T: Plain, const N: usize>(bytes: &[u8; N]) -> T {
    const { assert!(size_of::<T>() == N) };
    // SAFETY: `T` is `Plain`, so any N bytes are one of its values; `transmute_copy` reads unaligned.
    unsafe { std::mem::transmute_copy(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_there_and_back() {
        let regs = kvm_regs { rax: 1, rip: 0x0102_0304_0506_0708, rflags: 2, ..Default::default() };
        let bytes: [u8; 144] = to_bytes(&regs);
        assert_eq!(bytes[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[128..136], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(from_bytes::<kvm_regs, 144>(&bytes), regs);
    }
}
