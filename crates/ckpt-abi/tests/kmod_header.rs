// SPDX-License-Identifier: MIT OR Apache-2.0
//! `kmod/ckpt.h` and its mirror are one interface: every number, size and offset of the header, as a C compiler sees it, is
//! that of `ckpt_abi::kmod`, and neither has one that the other lacks.

use ckpt_abi::kmod::{self, GetRuns, Query, Run, Snapshot};
use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

type Numbers = BTreeMap<String, u64>;

macro_rules! layout {
    ($out:ident, $c:literal, $rust:ident { $($field:ident),* $(,)? }) => {
        $out.insert(format!("sizeof {}", $c), size_of::<$rust>() as u64);
        $($out.insert(format!("{}.{}", $c, stringify!($field)), offset_of!($rust, $field) as u64);)*
        // A field that is not listed above does not compile.
        let $rust { $($field),* } = $rust::default();
        $($out.insert(format!("sizeof {}.{}", $c, stringify!($field)), size_of_val(&$field) as u64);)*
    };
}

fn mirror() -> Numbers {
    let mut out = Numbers::new();
    let mut number = |name: &str, value: u64| out.insert(name.to_owned(), value);
    number("CKPT_ABI_VERSION", kmod::ABI_VERSION.into());
    number("CKPT_IOC_QUERY", kmod::QUERY.into());
    number("CKPT_IOC_ATTACH", kmod::ATTACH.into());
    number("CKPT_IOC_SNAPSHOT", kmod::SNAPSHOT.into());
    number("CKPT_IOC_GETRUNS", kmod::GETRUNS.into());
    number("CKPT_FEATURE_INCREMENTAL", kmod::FEATURE_INCREMENTAL);
    number("CKPT_FEATURE_THP", kmod::FEATURE_THP);
    number("CKPT_FEATURE_TEST_BUILD", kmod::FEATURE_TEST_BUILD);
    number("CKPT_SNAPSHOT_INCREMENTAL", kmod::SNAPSHOT_INCREMENTAL.into());
    number("CKPT_SNAPSHOT_CLEAR", kmod::SNAPSHOT_CLEAR.into());
    number("CKPT_KIND_DATA", kmod::KIND_DATA.into());
    number("CKPT_KIND_SAME", kmod::KIND_SAME.into());
    number("CKPT_KIND_ZERO", kmod::KIND_ZERO.into());
    number("CKPT_KIND_COPY", kmod::KIND_COPY.into());
    number("CKPT_KIND_FOREIGN", kmod::KIND_FOREIGN.into());
    layout!(
        out,
        "ckpt_query",
        Query {
            size,
            abi_version,
            features,
            page_size,
            max_snapshots,
            max_pages,
            held_pages,
            sessions,
            snapshots,
            reserved,
        }
    );
    layout!(
        out,
        "ckpt_snapshot_args",
        Snapshot {
            size,
            flags,
            generation,
            fd,
            reserved0,
            pages_data,
            pages_same,
            pages_zero,
            pages_copy,
            pages_foreign,
            ns_walk,
            ns_flush,
            reserved,
        }
    );
    layout!(out, "ckpt_run", Run { va, npages, kind });
    layout!(out, "ckpt_getruns", GetRuns { size, kinds, va, npages, runs, nruns, reserved });
    out
}

/// Everything that the header defines: names of macros, and fields as `structure.field`.
fn defined(header: &str) -> (Vec<String>, Vec<(String, String)>) {
    let private = |name: &str| matches!(name, "CKPT_H" | "CKPT_IOC_MAGIC");
    let (mut macros, mut fields, mut within) = (Vec::new(), Vec::new(), None);
    for line in header.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("#define ") {
            let name = rest.split_whitespace().next().unwrap_or_default();
            if !private(name) {
                macros.push(name.to_owned());
            }
        } else if let Some(name) = line.strip_prefix("struct ").and_then(|rest| rest.strip_suffix(" {")) {
            within = Some(name.to_owned());
        } else if line == "};" {
            within = None;
        } else if let (Some(structure), true) = (&within, line.starts_with("__")) {
            let last = line.split_whitespace().nth(1).unwrap_or_default();
            let field: String = last.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            fields.push((structure.clone(), field));
        }
    }
    (macros, fields)
}

#[test]
fn the_header_and_its_mirror_agree() {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kmod/ckpt.h");
    let text = std::fs::read_to_string(&header).unwrap();
    let (macros, fields) = defined(&text);
    let mut c = format!("#include <stddef.h>\n#include <stdio.h>\n#include \"{}\"\n", header.display());
    c.push_str("int main(void) {\n");
    for name in &macros {
        c.push_str(&format!("printf(\"{name}=%llu\\n\", (unsigned long long)({name}));\n"));
    }
    let mut structures: Vec<&String> = fields.iter().map(|(structure, _)| structure).collect();
    structures.dedup();
    for name in structures {
        c.push_str(&format!("printf(\"sizeof {name}=%zu\\n\", sizeof(struct {name}));\n"));
    }
    for (structure, field) in &fields {
        c.push_str(&format!(
            "printf(\"{structure}.{field}=%zu\\n\", offsetof(struct {structure}, {field}));\n"
        ));
        c.push_str(&format!(
            "printf(\"sizeof {structure}.{field}=%zu\\n\", sizeof(((struct {structure} *)0)->{field}));\n"
        ));
    }
    c.push_str("return 0; }\n");
    let directory = std::env::temp_dir().join(format!("ckpt-header-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let (source, program) = (directory.join("header.c"), directory.join("header"));
    std::fs::write(&source, c).unwrap();
    let compiled = Command::new("cc").args(["-Wall", "-Werror", "-o"]).arg(&program).arg(&source).status();
    assert!(compiled.unwrap().success(), "the header compiles");
    let printed = Command::new(&program).output().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    let seen: Numbers = String::from_utf8(printed.stdout)
        .unwrap()
        .lines()
        .map(|line| {
            let (name, value) = line.split_once('=').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect();
    assert!(seen.len() > 40, "the header was understood: {seen:?}");
    assert_eq!(seen, mirror());
}
