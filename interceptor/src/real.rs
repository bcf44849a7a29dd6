// SPDX-License-Identifier: MIT OR Apache-2.0
//! The next definitions of the interposed functions: what the application would have called without us.
//!
//! They are looked up in the objects that follow ours in load order, as `dlsym(RTLD_NEXT, …)` does, so
//! that other preloaded libraries keep working. `dlsym` itself is not used: its version in the libc of the
//! build host (2.34) would keep the library from loading into programs with an older libc, and before that
//! it lived in a library of its own. `dl_iterate_phdr` has been in libc since 2.2.5 and allocates nothing.
//!
//! Format: ELF dynamic symbol tables (`System V ABI`, chapter 5), with `DT_GNU_HASH` or `DT_HASH`, and the
//! default version of each symbol (`DT_VERSYM` without the hidden bit).
//!
//! Limits: a program linked against a libc before 2.15 gets the newer `posix_spawn`, which does not run a
//! script without `#!` by the shell.

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// `execve(2)`.
pub type Execve = unsafe extern "C" fn(*const c_char, *const *const c_char, *const *const c_char) -> c_int;
/// `execveat(2)`.
pub type Execveat =
    unsafe extern "C" fn(c_int, *const c_char, *const *const c_char, *const *const c_char, c_int) -> c_int;
/// `fexecve(3)`.
pub type Fexecve = unsafe extern "C" fn(c_int, *const *const c_char, *const *const c_char) -> c_int;
/// `posix_spawn(3)` and `posix_spawnp(3)`.
pub type Spawn = unsafe extern "C" fn(
    *mut libc::pid_t,
    *const c_char,
    *const libc::posix_spawn_file_actions_t,
    *const libc::posix_spawnattr_t,
    *const *const c_char,
    *const *const c_char,
) -> c_int;

/// `inotify_add_watch(2)`.
pub type InotifyAddWatch = unsafe extern "C" fn(c_int, *const c_char, u32) -> c_int;
/// `pthread_create(3)`.
pub type PthreadCreate = unsafe extern "C" fn(
    *mut libc::pthread_t,
    *const libc::pthread_attr_t,
    extern "C" fn(*mut c_void) -> *mut c_void,
    *mut c_void,
) -> c_int;
/// `vfork(2)`.
pub type Vfork = unsafe extern "C" fn() -> libc::pid_t;
/// `sendmsg(2)`.
pub type Sendmsg = unsafe extern "C" fn(c_int, *const libc::msghdr, c_int) -> isize;
/// `sendmmsg(2)`.
pub type Sendmmsg = unsafe extern "C" fn(c_int, *mut libc::mmsghdr, c_uint, c_int) -> c_int;

/// One interposed function: its name, and its next definition once [`resolve`] has run.
struct Next {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self { name, address: AtomicPtr::new(core::ptr::null_mut()) }
    }

    fn get(&self) -> Option<*mut c_void> {
        if !RESOLVED.load(Ordering::Acquire) {
            // Another library's constructor, run before ours, starts a program.
            resolve();
        }
        let address = self.address.load(Ordering::Acquire);
        (!address.is_null()).then_some(address)
    }
}

static EXECVE: Next = Next::new(c"execve");
static EXECVPE: Next = Next::new(c"execvpe");
static EXECVEAT: Next = Next::new(c"execveat");
static FEXECVE: Next = Next::new(c"fexecve");
static POSIX_SPAWN: Next = Next::new(c"posix_spawn");
static POSIX_SPAWNP: Next = Next::new(c"posix_spawnp");
static INOTIFY_ADD_WATCH: Next = Next::new(c"inotify_add_watch");
static VFORK: Next = Next::new(c"vfork");
static SENDMSG: Next = Next::new(c"sendmsg");
static SENDMMSG: Next = Next::new(c"sendmmsg");
static SYSCALL: Next = Next::new(c"syscall");
static PTHREAD_CREATE: Next = Next::new(c"pthread_create");
static ALL: [&Next; 12] = [
    &EXECVE,
    &EXECVPE,
    &EXECVEAT,
    &FEXECVE,
    &POSIX_SPAWN,
    &POSIX_SPAWNP,
    &INOTIFY_ADD_WATCH,
    &VFORK,
    &SENDMSG,
    &SENDMMSG,
    &SYSCALL,
    &PTHREAD_CREATE,
];

static RESOLVED: AtomicBool = AtomicBool::new(false);
/// The path we were loaded from, null while unknown; owned by the dynamic loader, which never unloads a
/// preload.
static OWN_PATH: AtomicPtr<c_char> = AtomicPtr::new(core::ptr::null_mut());

macro_rules! next_function {
    ($(#[$doc:meta])* $name:ident, $cell:ident, $type:ty) => {
        $(#[$doc])*
        pub fn $name() -> Option<$type> {
            // SAFETY: the address is that of the function symbol of this name, whose C prototype is this
            // type.
            $cell.get().map(|address| unsafe { core::mem::transmute::<*mut c_void, $type>(address) })
        }
    };
}

next_function!(
    /// The next `execve`.
    execve, EXECVE, Execve
);
next_function!(
    /// The next `execvpe`.
    execvpe, EXECVPE, Execve
);
next_function!(
    /// The next `execveat`; libc has it since 2.34.
    execveat, EXECVEAT, Execveat
);
next_function!(
    /// The next `fexecve`.
    fexecve, FEXECVE, Fexecve
);
next_function!(
    /// The next `posix_spawn`.
    posix_spawn, POSIX_SPAWN, Spawn
);
next_function!(
    /// The next `posix_spawnp`.
    posix_spawnp, POSIX_SPAWNP, Spawn
);
next_function!(
    /// The next `inotify_add_watch`.
    inotify_add_watch, INOTIFY_ADD_WATCH, InotifyAddWatch
);

next_function!(
    /// `pthread_create`, which is not interposed; before libc 2.34 only programs with threads have it.
    pthread_create, PTHREAD_CREATE, PthreadCreate
);
next_function!(
    /// The next `vfork`.
    vfork, VFORK, Vfork
);
next_function!(
    /// The next `sendmsg`.
    sendmsg, SENDMSG, Sendmsg
);
next_function!(
    /// The next `sendmmsg`; libc has it since 2.14.
    sendmmsg, SENDMMSG, Sendmmsg
);

/// The next `syscall`.
pub fn syscall() -> Option<*mut c_void> {
    SYSCALL.get()
}

/// The absolute path we were loaded from, if there is one that `LD_PRELOAD` can name.
pub fn own_path() -> Option<&'static CStr> {
    if !RESOLVED.load(Ordering::Acquire) {
        resolve();
    }
    let path = OWN_PATH.load(Ordering::Acquire);
    // SAFETY: not null, so it is the loader's NUL-terminated name of our object, which lives as long as we
    // do.
    (!path.is_null()).then(|| unsafe { CStr::from_ptr(path) })
}

/// Finds our own path and the next definitions. Running it twice, or in two threads at once, stores the
/// same values twice.
pub fn resolve() {
    let mut walk = Walk { passed_ourselves: false };
    // SAFETY: the callback is called with our `walk` and only during this call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut walk).cast()) };
    RESOLVED.store(true, Ordering::Release);
}

struct Walk {
    passed_ourselves: bool,
}

/// Called by the dynamic loader for each loaded object, in load order.
unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _size: usize, walk: *mut c_void) -> c_int {
    // SAFETY: the loader passes a valid description of a loaded object, and the pointer handed to
    // dl_iterate_phdr.
    let (info, walk) = unsafe { (&*info, &mut *walk.cast::<Walk>()) };
    // SAFETY: the program headers of a loaded object.
    let headers = unsafe { core::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum as usize) };
    let base = info.dlpi_addr as usize;
    if !walk.passed_ourselves {
        let here = visit as *const () as usize;
        if headers.iter().any(|header| {
            header.p_type == libc::PT_LOAD
                && here.wrapping_sub(base.wrapping_add(header.p_vaddr as usize)) < header.p_memsz as usize
        }) {
            walk.passed_ourselves = true;
            // SAFETY: the name of an object is a NUL-terminated string, or null.
            if !info.dlpi_name.is_null() && unsafe { *info.dlpi_name } == b'/' as c_char {
                OWN_PATH.store(info.dlpi_name.cast_mut(), Ordering::Release);
            }
        }
        return 0;
    }
    let Some(dynamic) = headers.iter().find(|header| header.p_type == libc::PT_DYNAMIC) else { return 0 };
    // SAFETY: PT_DYNAMIC of a loaded object lies at this address.
    let symbols = unsafe {
        SymbolTable::of_object(base, base.wrapping_add(dynamic.p_vaddr as usize) as *const Dynamic)
    };
    let Some(symbols) = symbols else { return 0 };
    let mut missing = false;
    for next in ALL {
        if next.address.load(Ordering::Relaxed).is_null() {
            // SAFETY: the tables are those of a loaded object.
            match unsafe { symbols.find(next.name) } {
                Some(address) => next.address.store(address, Ordering::Release),
                None => missing = true,
            }
        }
    }
    // Not zero ends the walk.
    c_int::from(!missing)
}

/// `Elf64_Dyn`.
#[repr(C)]
struct Dynamic {
    tag: i64,
    value: usize,
}

const DT_NULL: i64 = 0;
const DT_HASH: i64 = 4;
const DT_STRTAB: i64 = 5;
const DT_SYMTAB: i64 = 6;
const DT_GNU_HASH: i64 = 0x6fff_fef5;
const DT_VERSYM: i64 = 0x6fff_fff0;
const STT_FUNC: u8 = 2;
const SHN_UNDEF: u16 = 0;
/// In a `DT_VERSYM` entry: not the default version of the symbol.
const VERSYM_HIDDEN: u16 = 0x8000;

/// The dynamic symbol table of one loaded object.
struct SymbolTable {
    base: usize,
    symbols: *const libc::Elf64_Sym,
    strings: *const c_char,
    versions: *const u16,
    gnu_hash: *const u32,
    sysv_hash: *const u32,
}

impl SymbolTable {
    /// # Safety
    /// `dynamic` is the dynamic section of an object loaded at `base`.
    unsafe fn of_object(base: usize, mut dynamic: *const Dynamic) -> Option<Self> {
        // The loader turns the offsets in a writable dynamic section into addresses; that of the vdso
        // keeps its offsets.
        let address = |value: usize| if value < base { base.wrapping_add(value) } else { value };
        let mut table = Self {
            base,
            symbols: core::ptr::null(),
            strings: core::ptr::null(),
            versions: core::ptr::null(),
            gnu_hash: core::ptr::null(),
            sysv_hash: core::ptr::null(),
        };
        // SAFETY: the section ends with DT_NULL, says the ABI.
        unsafe {
            while (*dynamic).tag != DT_NULL {
                let value = address((*dynamic).value);
                match (*dynamic).tag {
                    DT_SYMTAB => table.symbols = value as *const libc::Elf64_Sym,
                    DT_STRTAB => table.strings = value as *const c_char,
                    DT_VERSYM => table.versions = value as *const u16,
                    DT_GNU_HASH => table.gnu_hash = value as *const u32,
                    DT_HASH => table.sysv_hash = value as *const u32,
                    _ => {}
                }
                dynamic = dynamic.add(1);
            }
        }
        let has_hash = !table.gnu_hash.is_null() || !table.sysv_hash.is_null();
        let usable = has_hash && !table.symbols.is_null() && !table.strings.is_null();
        usable.then_some(table)
    }

    /// The address of the function `name`, in its default version.
    ///
    /// # Safety
    /// The object is still loaded.
    unsafe fn find(&self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: the caller's.
        unsafe {
            if self.gnu_hash.is_null() { self.find_by_sysv_hash(name) } else { self.find_by_gnu_hash(name) }
        }
    }

    /// # Safety
    /// As [`Self::find`]; `DT_GNU_HASH` is there.
    unsafe fn find_by_gnu_hash(&self, name: &CStr) -> Option<*mut c_void> {
        let hash = name
            .to_bytes()
            .iter()
            .fold(5381u32, |hash, byte| hash.wrapping_mul(33).wrapping_add(u32::from(*byte)));
        // SAFETY: nbuckets, symoffset, bloom_size (64-bit words), bloom_shift, bloom, buckets, chain: the
        // format of the section, all within the mapped object; a chain ends at an entry with bit 0 set.
        unsafe {
            let (buckets_count, first_symbol) = (*self.gnu_hash, *self.gnu_hash.add(1));
            let bloom_words = *self.gnu_hash.add(2) as usize;
            if buckets_count == 0 {
                return None;
            }
            let buckets = self.gnu_hash.add(4 + 2 * bloom_words);
            let chain = buckets.add(buckets_count as usize);
            let mut index = *buckets.add((hash % buckets_count) as usize);
            if index < first_symbol {
                return None;
            }
            loop {
                let entry = *chain.add((index - first_symbol) as usize);
                if entry | 1 == hash | 1
                    && let Some(address) = self.address_if(index as usize, name)
                {
                    return Some(address);
                }
                if entry & 1 != 0 {
                    return None;
                }
                index += 1;
            }
        }
    }

    /// # Safety
    /// As [`Self::find`]; `DT_HASH` is there.
    unsafe fn find_by_sysv_hash(&self, name: &CStr) -> Option<*mut c_void> {
        let hash = name.to_bytes().iter().fold(0u32, |hash, byte| {
            let hash = (hash << 4).wrapping_add(u32::from(*byte));
            let high = hash & 0xf000_0000;
            (hash ^ (high >> 24)) & !high
        });
        // SAFETY: nbucket, nchain, buckets, chains: the format of the section; index 0 ends a chain.
        unsafe {
            let buckets_count = *self.sysv_hash;
            if buckets_count == 0 {
                return None;
            }
            let buckets = self.sysv_hash.add(2);
            let chains = buckets.add(buckets_count as usize);
            let mut index = *buckets.add((hash % buckets_count) as usize);
            while index != 0 {
                if let Some(address) = self.address_if(index as usize, name) {
                    return Some(address);
                }
                index = *chains.add(index as usize);
            }
        }
        None
    }

    /// The address of symbol `index` if it is a function defined here, is called `name` and has the
    /// default version.
    ///
    /// # Safety
    /// As [`Self::find`]; `index` comes from the object's hash table.
    unsafe fn address_if(&self, index: usize, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: an index of the hash table is one of the symbol table and of the version table; a name's
        // offset lies in the string table.
        unsafe {
            let symbol = &*self.symbols.add(index);
            let matches = symbol.st_shndx != SHN_UNDEF
                && symbol.st_info & 0xf == STT_FUNC
                && (self.versions.is_null() || *self.versions.add(index) & VERSYM_HIDDEN == 0)
                && CStr::from_ptr(self.strings.add(symbol.st_name as usize)) == name;
            matches.then(|| self.base.wrapping_add(symbol.st_value as usize) as *mut c_void)
        }
    }
}
