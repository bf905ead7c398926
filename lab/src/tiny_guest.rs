//! Tiny freestanding guests: a few plain instructions in an ELF vmlinux.
//!
//! Called by the native KVM tests and the engine benchmarks. They run on any KVM, including one that
//! emulates every instruction (PVM), so they use nothing but moves, port I/O, arithmetic and `hlt`:
//! no interrupts, no SSE, no system instructions. Refuses to be an operating system: there is no
//! stack use, no IDT, and every exception is a triple fault.

/// Where the code is loaded and entered, in 64-bit mode under an identity map of 4 GiB.
const LOAD_ADDRESS: u64 = 0x10_0000;
/// Where guests may write without touching their own code.
pub const SCRATCH: u64 = 0x20_0000;
/// Registers of the first virtio-mmio device; the others follow at this distance.
const FIRST_DEVICE: u64 = 0xd000_0000;
const DEVICE_BYTES: u64 = 0x1000;
const LOCAL_APIC: u64 = 0xfee0_0000;
/// Where the VM process keeps the generation id: the VM's `layout::GENERATION_ID`.
pub const GENERATION_ID: u64 = 0xe_f000;
/// Where the second vCPU starts, in real mode: page 8.
const TRAMPOLINE: u64 = 0x8000;

const SERIAL: u16 = 0x3f8;

/// A virtqueue of a VM with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Requests to the disk.
    Disk,
    /// Packets to the guest. Only looked at while there is one.
    VsockToGuest,
    /// Packets from the guest.
    VsockFromGuest,
    /// Requests for randomness.
    Rng,
    /// Reports of free pages.
    Balloon,
}

/// Every [`Place`].
pub const ALL_PLACES: [Place; 5] =
    [Place::Disk, Place::VsockToGuest, Place::VsockFromGuest, Place::Rng, Place::Balloon];

impl Place {
    /// Number of the device, and of its queue.
    fn numbers(self) -> (u64, u32) {
        match self {
            Self::Disk => (0, 0),
            Self::VsockToGuest => (1, 0),
            Self::VsockFromGuest => (1, 1),
            Self::Rng => (2, 0),
            Self::Balloon => (3, 2),
        }
    }
}

/// What a queue is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Garbage {
    /// The descriptor table lies outside guest memory.
    TableOutsideMemory,
    /// The available index is ahead by more than the queue has entries.
    IndexRunsAhead,
    /// A descriptor points outside guest memory.
    BufferOutsideMemory,
    /// A chain that leads back to itself.
    Loop,
    /// A chain starts behind the end of the table.
    HeadOutsideTable,
}

/// Every kind of [`Garbage`].
pub const ALL_GARBAGE: [Garbage; 5] = [
    Garbage::TableOutsideMemory,
    Garbage::IndexRunsAhead,
    Garbage::BufferOutsideMemory,
    Garbage::Loop,
    Garbage::HeadOutsideTable,
];

/// What a guest does, after it has said what it has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Waits for interrupts that never come: idle, alive.
    Idle,
    /// Halts with interrupts off: nothing can wake it.
    Halt,
    /// Runs in a circle.
    Spin,
    /// An undefined instruction without an IDT.
    TripleFault,
    /// Resets by the keyboard controller.
    Reset,
    /// Powers off by the ACPI sleep register.
    PowerOff,
    /// Writes this many bytes to the console, then halts.
    Flood(u32),
    /// Writes one byte into each of `pages` pages from [`SCRATCH`] on, says `.`, then idles.
    TouchPages(u32),
    /// Gives a device a queue full of nonsense, then idles.
    Garbage(Place, Garbage),
    /// Takes one packet from the vsock device, resets the device, says `r`, then halts.
    ResetVsock,
    /// Writes pseudo-random values, from this seed on, into random registers of all devices, then
    /// halts.
    Scribble(u32),
    /// Runs in a circle until the first four bytes of [`GENERATION_ID`] are not what they were, says
    /// `R`, then idles.
    WaitForGeneration,
    /// As [`Then::WaitForGeneration`], but says `R` at every change from then on.
    WaitForGenerations,
    /// Starts the second vCPU, which says `2` and halts, then halts too.
    StartSecond,
    /// Puts the other vCPUs into the state that INIT leaves them in, as Linux does before it halts,
    /// then halts.
    InitOthers,
}

/// A vmlinux that writes `text` to the console and then does `then`.
#[must_use]
pub fn vmlinux(text: &str, then: Then) -> Vec<u8> {
    let mut code = Assembler::default();
    code.set_dx(SERIAL);
    if matches!(then, Then::WaitForGeneration | Then::WaitForGenerations) {
        // Before it says anything: who hears of it may stop it at any instruction from then on, and what
        // it takes for the old id must not be the new one.
        code.set_rbx(GENERATION_ID);
        code.load_ecx();
    }
    for byte in text.bytes() {
        code.set_al(byte);
        code.out_dx_al();
    }
    match then {
        Then::Idle => code.idle(),
        Then::Halt => code.halt(),
        Then::Spin => code.bytes(&[0xeb, 0xfe]),
        Then::TripleFault => code.bytes(&[0x0f, 0x0b]),
        Then::Reset => {
            code.set_dx(0x64);
            code.set_al(0xfe);
            code.out_dx_al();
            code.halt();
        }
        Then::PowerOff => {
            code.set_dx(0x600);
            code.set_al(0x34);
            code.out_dx_al();
            code.halt();
        }
        Then::Flood(count) => {
            code.set_al(b'x');
            code.repeat(count, |code| code.out_dx_al());
            code.halt();
        }
        Then::TouchPages(pages) => touch_pages(&mut code, pages),
        Then::Garbage(place, garbage) => fill_queue(&mut code, place, garbage),
        Then::ResetVsock => reset_vsock(&mut code),
        Then::Scribble(seed) => scribble(&mut code, seed),
        Then::WaitForGeneration => {
            code.wait_while_ecx();
            code.set_al(b'R');
            code.out_dx_al();
            code.idle();
        }
        Then::WaitForGenerations => {
            let start = code.code.len();
            code.wait_while_ecx();
            code.load_ecx();
            code.set_al(b'R');
            code.out_dx_al();
            code.jump_to(start);
        }
        Then::StartSecond => start_second(&mut code),
        Then::InitOthers => {
            init_others(&mut code);
            code.halt();
        }
    }
    elf(&code.code)
}

fn touch_pages(code: &mut Assembler, pages: u32) {
    code.set_rbx(SCRATCH);
    code.repeat(pages, |code| {
        code.bytes(&[0x88, 0x0b]); // mov [rbx], cl
        code.bytes(&[0x48, 0x81, 0xc3]); // add rbx, imm32
        code.bytes(&4096u32.to_le_bytes());
    });
    code.set_al(b'.');
    code.out_dx_al();
    code.idle();
}

/// Copies the real-mode code to its page and sends INIT and SIPI to the other processors.
fn start_second(code: &mut Assembler) {
    // mov dx, 0x3f8; mov al, '2'; out dx, al; cli; hlt; jmp back to the hlt
    const REAL_MODE: [u8; 10] = [0xba, 0xf8, 0x03, 0xb0, b'2', 0xee, 0xfa, 0xf4, 0xeb, 0xfd];
    const SIPI_ALL_BUT_SELF: u32 = 0x000c_4600;
    code.set_rbx(TRAMPOLINE);
    for (at, byte) in (0u32..).zip(REAL_MODE) {
        code.store_u8(at, byte);
    }
    init_others(code);
    code.store_u32(ICR_LOW, SIPI_ALL_BUT_SELF | 8);
    code.halt();
}

/// Low half of the interrupt command register.
const ICR_LOW: u32 = 0x300;

/// Sends INIT to the other processors. Leaves the base of stores at the local APIC.
fn init_others(code: &mut Assembler) {
    const INIT_ALL_BUT_SELF: u32 = 0x000c_4500;
    code.set_rbx(LOCAL_APIC);
    // Software-enable the local APIC.
    code.store_u32(0xf0, 0x1ff);
    code.store_u32(ICR_LOW, INIT_ALL_BUT_SELF);
}

/// The parts of a queue, from [`SCRATCH`] on.
const DESCRIPTORS: u32 = 0x0;
const AVAILABLE: u32 = 0x1000;
const USED: u32 = 0x2000;

/// Drives the registers as a driver does, with memory contents that no driver writes.
fn fill_queue(code: &mut Assembler, place: Place, garbage: Garbage) {
    const NEXT: u32 = 1;
    code.set_rbx(SCRATCH);
    // One descriptor: address, length, flags and next.
    let outside = garbage == Garbage::BufferOutsideMemory;
    code.store_u32(DESCRIPTORS, if outside { 0xdead_0000 } else { 0x30_0000 });
    code.store_u32(DESCRIPTORS + 4, if outside { 0x7f } else { 0 });
    code.store_u32(DESCRIPTORS + 8, 16);
    code.store_u32(DESCRIPTORS + 12, if garbage == Garbage::Loop { NEXT } else { 0 });
    // Available ring: flags, index, first entry.
    let index: u32 = if garbage == Garbage::IndexRunsAhead { 0x7fff } else { 1 };
    code.store_u32(AVAILABLE, index << 16);
    let head = if garbage == Garbage::HeadOutsideTable { 0xffff } else { 0 };
    code.store_u32(AVAILABLE + 4, head);

    let table_high = if garbage == Garbage::TableOutsideMemory { 0x7f } else { 0 };
    bring_up(code, place, table_high);
    code.idle();
}

/// Brings a device up with one queue, whose parts lie in [`SCRATCH`], and notifies it.
fn bring_up(code: &mut Assembler, place: Place, table_high: u32) {
    let (device, queue) = place.numbers();
    code.set_rbx(FIRST_DEVICE + device * DEVICE_BYTES);
    let scratch = u32::try_from(SCRATCH).unwrap_or(0);
    for (register, value) in [
        (0x70, 0),                     // status: reset
        (0x70, 1),                     // acknowledge
        (0x70, 3),                     // driver
        (0x24, 1),                     // feature bits 32 and up:
        (0x20, 1),                     // VERSION_1
        (0x70, 0xb),                   // features ok
        (0x30, queue),                 // select the queue
        (0x38, 8),                     // eight entries
        (0x80, scratch + DESCRIPTORS), // table
        (0x84, table_high),
        (0x90, scratch + AVAILABLE),
        (0x94, 0),
        (0xa0, scratch + USED),
        (0xa4, 0),
        (0x44, 1),     // ready
        (0x70, 0xf),   // driver ok
        (0x50, queue), // notify
    ] {
        code.store_u32(register, value);
    }
}

/// Gives the device one buffer, waits until it is used, and takes everything back.
fn reset_vsock(code: &mut Assembler) {
    const WRITE: u32 = 2;
    code.set_rbx(SCRATCH);
    for (offset, value) in [(0, 0x30_0000), (4, 0), (8, 4096), (12, WRITE)] {
        code.store_u32(DESCRIPTORS + offset, value);
    }
    // Index 1, first entry 0.
    code.store_u32(AVAILABLE, 1 << 16);
    code.store_u32(AVAILABLE + 4, 0);
    bring_up(code, Place::VsockToGuest, 0);
    let (device, _) = Place::VsockToGuest.numbers();
    code.set_rbx(SCRATCH);
    code.wait_while_zero(USED);
    code.set_rbx(FIRST_DEVICE + device * DEVICE_BYTES);
    code.store_u32(0x70, 0);
    code.set_al(b'r');
    code.out_dx_al();
    code.halt();
}

/// Stores to registers, in no order that a driver would keep.
fn scribble(code: &mut Assembler, seed: u32) {
    const STORES: u32 = 300;
    const DEVICES: u64 = 4;
    let mut state = u64::from(seed);
    let mut random = |bound: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        u32::try_from((state >> 33) % bound).unwrap_or(0)
    };
    // What a driver writes to come up, so that the rest is not all refused at the door.
    const STEPS: [(u32, u32); 8] = [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 0xb),
        (0x70, 0xf),
        (0x44, 1),
    ];
    for _ in 0..STORES {
        code.set_rbx(FIRST_DEVICE + u64::from(random(DEVICES)) * DEVICE_BYTES);
        if random(10) == 0 {
            STEPS.iter().for_each(|(register, value)| code.store_u32(*register, *value));
        }
        let register = random(0x50) * 4;
        let value = match random(3) {
            0 => random(16),
            1 => random(0x40) << 12,
            _ => random(1 << 31),
        };
        code.store_u32(register, value);
    }
    code.halt();
}

/// Machine code, one instruction at a time. `rbx` is the base of stores, `ecx` counts.
#[derive(Debug, Default)]
struct Assembler {
    code: Vec<u8>,
}

impl Assembler {
    fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn set_dx(&mut self, value: u16) {
        self.bytes(&[0x66, 0xba]);
        self.bytes(&value.to_le_bytes());
    }

    fn set_al(&mut self, value: u8) {
        self.bytes(&[0xb0, value]);
    }

    fn out_dx_al(&mut self) {
        self.bytes(&[0xee]);
    }

    fn set_rbx(&mut self, value: u64) {
        self.bytes(&[0x48, 0xbb]);
        self.bytes(&value.to_le_bytes());
    }

    /// `mov dword [rbx + offset], value`
    fn store_u32(&mut self, offset: u32, value: u32) {
        self.bytes(&[0xc7, 0x83]);
        self.bytes(&offset.to_le_bytes());
        self.bytes(&value.to_le_bytes());
    }

    /// `mov byte [rbx + offset], value`
    fn store_u8(&mut self, offset: u32, value: u8) {
        self.bytes(&[0xc6, 0x83]);
        self.bytes(&offset.to_le_bytes());
        self.bytes(&[value]);
    }

    /// `cmp dword [rbx + offset], 0; je` back to it
    fn wait_while_zero(&mut self, offset: u32) {
        self.bytes(&[0x83, 0xbb]);
        self.bytes(&offset.to_le_bytes());
        self.bytes(&[0, 0x74, 0xf7]);
    }

    /// `mov ecx, [rbx]`
    fn load_ecx(&mut self) {
        self.bytes(&[0x8b, 0x0b]);
    }

    /// `cmp ecx, [rbx]; je` back to it
    fn wait_while_ecx(&mut self) {
        self.bytes(&[0x3b, 0x0b, 0x74, 0xfc]);
    }

    /// `jmp` to an earlier place, at most 126 bytes back.
    fn jump_to(&mut self, start: usize) {
        let back = u8::try_from(self.code.len() + 2 - start).unwrap_or(u8::MAX);
        self.bytes(&[0xeb, back.wrapping_neg()]);
    }

    /// Runs `body` `count` times, counting `ecx` down. `count` 0 runs it 2^32 times.
    fn repeat(&mut self, count: u32, body: impl FnOnce(&mut Self)) {
        self.bytes(&[0xb9]);
        self.bytes(&count.to_le_bytes());
        let start = self.code.len();
        body(self);
        self.bytes(&[0xff, 0xc9]); // dec ecx
        // jnz rel32, counted from the end of the jump.
        let back = self.code.len() + 6 - start;
        let back = u32::try_from(back).unwrap_or(0);
        self.bytes(&[0x0f, 0x85]);
        self.bytes(&back.wrapping_neg().to_le_bytes());
    }

    /// `cli; hlt`, in a circle: an NMI would come out of `hlt`.
    fn halt(&mut self) {
        self.bytes(&[0xfa, 0xf4, 0xeb, 0xfd]);
    }

    /// `sti; hlt`, in a circle.
    fn idle(&mut self) {
        self.bytes(&[0xfb, 0xf4, 0xeb, 0xfd]);
    }
}

/// An ELF executable of one segment that is loaded and entered at [`LOAD_ADDRESS`].
fn elf(code: &[u8]) -> Vec<u8> {
    const EHDR_BYTES: u16 = 64;
    const PHDR_BYTES: u16 = 56;
    const CODE_OFFSET: u64 = 0x1000;
    let length = code.len() as u64;
    let mut image = Vec::new();
    image.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend_from_slice(&2u16.to_le_bytes()); // executable
    image.extend_from_slice(&62u16.to_le_bytes()); // x86-64
    image.extend_from_slice(&1u32.to_le_bytes());
    image.extend_from_slice(&LOAD_ADDRESS.to_le_bytes()); // entry
    image.extend_from_slice(&u64::from(EHDR_BYTES).to_le_bytes()); // program headers
    image.extend_from_slice(&0u64.to_le_bytes()); // no sections
    image.extend_from_slice(&0u32.to_le_bytes());
    for half in [EHDR_BYTES, PHDR_BYTES, 1, 64, 0, 0] {
        image.extend_from_slice(&half.to_le_bytes());
    }
    image.extend_from_slice(&1u32.to_le_bytes()); // load
    image.extend_from_slice(&7u32.to_le_bytes()); // read, write, execute
    for word in [CODE_OFFSET, LOAD_ADDRESS, LOAD_ADDRESS, length, length, 0x1000] {
        image.extend_from_slice(&word.to_le_bytes());
    }
    image.resize(usize::try_from(CODE_OFFSET).unwrap_or(0), 0);
    image.extend_from_slice(code);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_jump_back_to_their_start() {
        let mut code = Assembler::default();
        code.repeat(3, Assembler::out_dx_al);
        // mov ecx, 3; out; dec ecx; jnz -9
        assert_eq!(
            code.code,
            [0xb9, 3, 0, 0, 0, 0xee, 0xff, 0xc9, 0x0f, 0x85, 0xf7, 0xff, 0xff, 0xff]
        );
    }

    #[test]
    fn waiting_for_generations_ends_where_it_began() {
        let image = vmlinux("", Then::WaitForGenerations);
        let code = &image[0x1000..];
        // mov dx; mov rbx, id; mov ecx, [rbx]; cmp ecx, [rbx]; je -4; mov ecx, [rbx]; mov al, 'R'; out;
        // jmp -11
        let rest = [0x8b, 0x0b, 0x3b, 0x0b, 0x74, 0xfc, 0x8b, 0x0b, 0xb0, b'R', 0xee, 0xeb, 0xf5];
        assert_eq!(&code[14..], rest);
    }

    #[test]
    fn images_are_small_and_start_with_the_magic() {
        for then in [Then::Halt, Then::StartSecond, Then::Garbage(Place::Disk, Garbage::Loop)] {
            let image = vmlinux("hello\n", then);
            assert_eq!(&image[..4], b"\x7fELF");
            assert!(image.len() < 0x1000 + 400, "{then:?}");
        }
    }
}
