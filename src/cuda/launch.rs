//! The one interface between launchers and what runs kernels: memory, and launch by kernel with packed arguments.
//!
//! [`Driver`] has two implementations, the GPU ([`super::gpu`]) and the emulator. Launchers know only [`Stream`],
//! [`Buffer`] and slices of it, so the same launchers run on both.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::{NoUninit, Pod};

pub use super::buffer::{Buffer, Slice, SliceMut};
use super::embedded::Kernel;
use super::error::{CudaError, Result};
use super::gemm::{GemmAddresses, GemmDescription};
use super::recording::RecordedWork;
use super::timing::Mark;
use crate::ops::Communicator;

/// Most arguments that a kernel takes; beyond it, pass a structure.
pub const MAX_ARGUMENTS: usize = 24;

/// Which memory an address belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceId {
    /// The GPU with this ordinal.
    Gpu(usize),
    /// An emulator, by the order of creation.
    Emulator(u64),
}

/// How many blocks and threads run a kernel, in one dimension, and the shared memory of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks, 1 to 2³¹ - 1.
    pub blocks: u32,
    /// Threads per block, a multiple of 32, at most 1024.
    pub threads: u32,
    /// Dynamic shared memory per block.
    pub shared_bytes: u32,
}

/// What a device allows a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most dynamic shared memory per block.
    pub shared_bytes: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
}

/// One kernel argument: its bytes, and where they point if they are an address.
#[derive(Debug, Clone, Copy)]
pub struct Argument<'a> {
    bytes: &'a [u8],
    device: Option<DeviceId>,
}

impl<'a> Argument<'a> {
    /// A number or a `#[repr(C)]` structure.
    pub fn value<T: NoUninit>(value: &'a T) -> Self {
        Self { bytes: bytemuck::bytes_of(value), device: None }
    }

    /// An address on a device.
    pub(super) fn address(address: &'a u64, device: Option<DeviceId>) -> Self {
        Self { bytes: bytemuck::bytes_of(address), device }
    }

    /// The bytes to copy into the kernel's parameter.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

/// What runs kernels: a stream of a GPU, or the emulator. Work is done in the order it is given.
pub trait Driver: fmt::Debug + Send + Sync {
    /// Whose memory this is.
    fn device(&self) -> DeviceId;

    /// What a launch may ask for.
    fn limits(&self) -> Limits;

    /// Reserves memory, at least one byte, aligned to 256. Its content is undefined.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Gives memory back once the work that was given so far is done, for which the host may wait; while work is recorded,
    /// when the recording ends.
    ///
    /// # Safety
    ///
    /// `address` came from `allocate` of this device and is not used again.
    unsafe fn release(&self, address: u64);

    /// Copies from the host; the source may be reused on return.
    ///
    /// # Safety
    ///
    /// `bytes.len()` bytes at `to` belong to one allocation of this device.
    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<()>;

    /// Copies to the host and waits for it.
    ///
    /// # Safety
    ///
    /// `bytes.len()` bytes at `from` belong to one allocation of this device.
    unsafe fn download(&self, bytes: &mut [u8], from: u64) -> Result<()>;

    /// Copies within the device.
    ///
    /// # Safety
    ///
    /// `bytes` bytes at both addresses belong to allocations of this device and do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// Sets every byte.
    ///
    /// # Safety
    ///
    /// `bytes` bytes at `to` belong to one allocation of this device.
    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<()>;

    /// Waits for the work that was given so far.
    fn synchronize(&self) -> Result<()>;

    /// Runs a kernel.
    ///
    /// # Safety
    ///
    /// The arguments are those of the kernel's signature in number, order, size and meaning, all addresses are valid for
    /// what the kernel's header comment says it reads and writes, and its preconditions hold.
    unsafe fn launch(&self, kernel: Kernel, grid: Grid, arguments: &[Argument<'_>]) -> Result<()>;

    /// How often memory was reserved so far, on the device and for copies to it.
    fn allocations(&self) -> u64;

    /// From here on work is recorded instead of run.
    fn begin_recording(&self) -> Result<()>;

    /// Ends what [`Driver::begin_recording`] began.
    fn end_recording(&self) -> Result<Box<dyn RecordedWork>>;

    /// Multiplies matrices; see [`super::gemm`].
    ///
    /// # Safety
    ///
    /// The description passed the checks of [`Stream::gemm`], and the matrices at the addresses, of this device, have the
    /// sizes and layouts that it says. The output overlaps nothing, or it is the addend.
    unsafe fn gemm(&self, description: &GemmDescription, addresses: &GemmAddresses) -> Result<()>;

    /// Joins this device with those of other processes, where it has a way of its own to them; whether it has. Collective.
    fn connect(&self, _processes: &dyn Communicator) -> crate::Result<bool> {
        Ok(false)
    }

    /// Starts to add f32 numbers up over the processes of [`Driver::connect`], behind the work that was given so far and beside
    /// what is given until [`Driver::finish_exchanges`]; `false` where there is no way from device to device.
    ///
    /// # Safety
    ///
    /// `length` numbers at `address` belong to one allocation of this device, and no work uses them until then.
    unsafe fn start_all_reduce(&self, _address: u64, _length: usize) -> Result<bool> {
        Ok(false)
    }

    /// The same for giving all processes the numbers of each: process `r` has those from `r * part` on, `part` of them or as
    /// many as there are.
    ///
    /// # Safety
    ///
    /// As for [`Driver::start_all_reduce`].
    unsafe fn start_all_gather(&self, _address: u64, _length: usize, _part: usize) -> Result<bool> {
        Ok(false)
    }

    /// Puts the work that is given from now on behind the exchanges that were started.
    fn finish_exchanges(&self) -> Result<()> {
        Ok(())
    }

    /// Marks this moment in the work that was given so far. Where devices have no clock, waits and takes the host's.
    fn mark(&self) -> Result<Mark> {
        self.synchronize()?;
        Ok(Mark::now())
    }
}

/// A queue of work on one device, and the source of its memory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stream {
    driver: Arc<dyn Driver>,
}

impl Stream {
    /// Wraps what runs the kernels.
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        Self { driver }
    }

    /// Which device this is.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.driver.device()
    }

    /// What a launch may ask for.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.driver.limits()
    }

    /// How often memory was reserved so far by all users of this stream, on the device and for copies to it.
    #[must_use]
    pub fn allocations(&self) -> u64 {
        self.driver.allocations()
    }

    /// What runs the kernels, for another driver to wrap.
    #[must_use]
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Reserves memory for `len` elements with undefined content, for what a launch writes in full.
    pub fn uninitialised<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or(CudaError::OutOfMemory { bytes: usize::MAX })?;
        let address = if bytes == 0 { 0 } else { self.driver.allocate(bytes)? };
        Ok(Buffer { address, len, driver: Arc::clone(&self.driver), element: PhantomData })
    }

    /// Reserves memory for `len` elements and sets its bits to zero.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let buffer = self.uninitialised(len)?;
        if len > 0 {
            // SAFETY: the buffer has exactly this many bytes.
            unsafe { self.driver.fill(buffer.address, 0, len * size_of::<T>())? };
        }
        Ok(buffer)
    }

    /// Reserves memory and copies a host slice into it.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.uninitialised(values.len())?;
        self.write(&mut buffer.as_mut_slice(), values)?;
        Ok(buffer)
    }

    /// Copies a host slice into memory of the same length.
    pub fn write<T: Pod>(&self, to: &mut SliceMut<'_, T>, values: &[T]) -> Result<()> {
        self.check("write", to.len, values.len(), to.device)?;
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: the slice has as many elements as the source, on this device.
        unsafe { self.driver.upload(to.address, bytemuck::cast_slice(values)) }
    }

    /// Copies memory to the host.
    pub fn download<T: Pod>(&self, from: &Slice<'_, T>) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); from.len];
        self.read(&mut values, from)?;
        Ok(values)
    }

    /// Copies memory into a host slice of the same length.
    pub fn read<T: Pod>(&self, values: &mut [T], from: &Slice<'_, T>) -> Result<()> {
        self.check("read", from.len, values.len(), from.device)?;
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: the slice has as many elements as the target, on this device.
        unsafe { self.driver.download(bytemuck::cast_slice_mut(values), from.address) }
    }

    /// Copies between memory of the same length. The borrows keep the two apart.
    pub fn copy<T: Pod>(&self, to: &mut SliceMut<'_, T>, from: &Slice<'_, T>) -> Result<()> {
        self.check("copy", to.len, from.len, to.device)?;
        self.check("copy", to.len, from.len, from.device)?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: both have this many bytes on this device; one is borrowed mutably, so they do not overlap.
        unsafe { self.driver.copy(to.address, from.address, from.len * size_of::<T>()) }
    }

    /// Sets every byte of some memory.
    pub fn fill<T: Pod>(&self, to: &mut SliceMut<'_, T>, byte: u8) -> Result<()> {
        self.check("fill", to.len, to.len, to.device)?;
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: the slice has exactly this many bytes, on this device; every bit pattern is a `Pod`.
        unsafe { self.driver.fill(to.address, byte, to.len * size_of::<T>()) }
    }

    /// Adds numbers up over the processes that this device is connected with, behind the work that was given so far; `false`
    /// where there is no way from device to device.
    pub fn all_reduce(&self, values: &mut SliceMut<'_, f32>) -> Result<bool> {
        // SAFETY: what comes next on this stream comes behind the sum.
        let summed = unsafe { self.start_all_reduce(values) }?;
        self.driver.finish_exchanges()?;
        Ok(summed)
    }

    /// The same beside the work that is given until [`Stream::finish_exchanges`].
    ///
    /// # Safety
    ///
    /// No work uses the memory until then.
    pub unsafe fn start_all_reduce(&self, values: &mut SliceMut<'_, f32>) -> Result<bool> {
        self.check("all_reduce", values.len, values.len, values.device)?;
        // SAFETY: the slice has exactly this many numbers, on this device; the caller's promise.
        unsafe { self.driver.start_all_reduce(values.address, values.len) }
    }

    /// Gives all processes that this device is connected with the numbers of each, behind the work that was given so far:
    /// process `r` has those from `r * part` on, `part` of them or as many as there are. `false` where there is no way from
    /// device to device.
    pub fn all_gather(&self, values: &mut SliceMut<'_, f32>, part: usize) -> Result<bool> {
        self.check("all_gather", values.len, values.len, values.device)?;
        // SAFETY: the slice has exactly this many numbers, on this device; what comes next comes behind the exchange.
        let gathered = unsafe { self.driver.start_all_gather(values.address, values.len, part) }?;
        self.driver.finish_exchanges()?;
        Ok(gathered)
    }

    /// Puts the work that is given from now on behind the sums that were started.
    pub fn finish_exchanges(&self) -> Result<()> {
        self.driver.finish_exchanges()
    }

    /// Waits for the work that was given so far.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize()
    }

    /// Runs a kernel; a grid without blocks is no work.
    ///
    /// # Safety
    ///
    /// As for [`Driver::launch`].
    pub unsafe fn launch(&self, kernel: Kernel, grid: Grid, arguments: &[Argument<'_>]) -> Result<()> {
        let device = self.device();
        for (index, argument) in arguments.iter().enumerate() {
            if argument.device.is_some_and(|of| of != device) {
                return Err(CudaError::WrongDevice { op: kernel.symbol(), argument: index });
            }
        }
        within(kernel.symbol(), "number of arguments", arguments.len() as u64, 0..=MAX_ARGUMENTS as u64)?;
        if grid.blocks == 0 {
            return Ok(());
        }
        within(kernel.symbol(), "blocks", grid.blocks.into(), 1..=MAX_32_BIT)?;
        within(kernel.symbol(), "threads per block", grid.threads.into(), 1..=1024)?;
        let shared = u64::from(self.limits().shared_bytes);
        within(kernel.symbol(), "shared memory in bytes", grid.shared_bytes.into(), 0..=shared)?;
        // SAFETY: what the caller promises.
        unsafe { self.driver.launch(kernel, grid, arguments) }
    }

    fn check(&self, op: &'static str, expected: usize, found: usize, device: DeviceId) -> Result<()> {
        exactly(op, "length", found as u64, expected as u64)?;
        if device != self.device() {
            return Err(CudaError::WrongDevice { op, argument: 0 });
        }
        Ok(())
    }
}

/// Largest count that kernels keep in 32 bits.
pub(crate) const MAX_32_BIT: u64 = (1 << 31) - 1;

/// Fails unless `found` is in `range`.
pub(crate) fn within(
    op: &'static str,
    what: &'static str,
    found: u64,
    range: std::ops::RangeInclusive<u64>,
) -> Result<()> {
    if range.contains(&found) {
        return Ok(());
    }
    Err(CudaError::Shape { op, what, found, expected: format!("{} to {}", range.start(), range.end()) })
}

/// Fails unless `found` is `expected`.
pub(crate) fn exactly(op: &'static str, what: &'static str, found: u64, expected: u64) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(CudaError::Shape { op, what, found, expected: expected.to_string() })
}

/// A product that is at most `limit`, or an error that names it.
pub(crate) fn product(op: &'static str, what: &'static str, factors: &[usize], limit: u64) -> Result<u64> {
    let value = factors.iter().try_fold(1u64, |value, &factor| value.checked_mul(factor as u64));
    match value {
        Some(value) if value <= limit => Ok(value),
        _ => Err(CudaError::Shape { op, what, found: value.unwrap_or(u64::MAX), expected: format!("at most {limit}") }),
    }
}

/// `Divider` of kernels/device.cuh: division by a launch constant as a multiplication and a shift.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Divider {
    divisor: u32,
    multiplier: u32,
    shift: u32,
}

impl Divider {
    /// Divides by `divisor`, from 1 to 2³¹ - 1; exact for dividends below 2³¹.
    pub(crate) fn new(divisor: u32) -> Self {
        let divisor = divisor.clamp(1, MAX_32_BIT as u32);
        // The smallest shift with 2^shift >= divisor.
        let shift = 32 - (divisor - 1).leading_zeros();
        let multiplier = ((1u64 << 32) * ((1u64 << shift) - u64::from(divisor))) / u64::from(divisor) + 1;
        Self { divisor, multiplier: multiplier as u32, shift }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quotient(dividend: u32, by: Divider) -> u32 {
        let high = ((u64::from(dividend) * u64::from(by.multiplier)) >> 32) as u32;
        (high + dividend) >> by.shift
    }

    #[test]
    fn divider_divides_at_the_edges() {
        let divisors =
            (1..=300).chain([588, 768, 1000, 4095, 4096, 4097, 65_537, 1 << 30, (1 << 30) + 1, (1 << 31) - 1]);
        for divisor in divisors {
            let by = Divider::new(divisor);
            let multiples = [0, 1, 2, 3, 1000, ((1 << 31) - 1) / divisor].map(|n| u64::from(n) * u64::from(divisor));
            let dividends = multiples.iter().flat_map(|&n| [n.saturating_sub(1), n, n + 1]);
            for dividend in dividends.filter(|&n| n < 1 << 31).map(|n| n as u32) {
                assert_eq!(quotient(dividend, by), dividend / divisor, "{dividend} / {divisor}");
            }
        }
    }
}
