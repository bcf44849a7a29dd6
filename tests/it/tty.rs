// SPDX-License-Identifier: MIT OR Apache-2.0
//! The terminal of a job. An interactive shell is in `apps`.

ckpt_tests::guest_tests! {
    settings => Guest::new("tty_settings").on_tty(), needs [kinds::TTY];
}

/// The guest on a terminal that `script` makes, without ckpt.
#[test]
fn settings_control_on_a_terminal() {
    use ckpt_tests::{
        Failure,
        guest::{Guest, Talk, passes},
        proof::each_user,
        user::Users,
    };
    each_user("tty-control", Users::Both, |sandbox| {
        let command = Guest::new("tty_settings").command(sandbox)?.join(" ");
        let words = ["script", "-qfc", &command, "/dev/null"].map(String::from);
        let _running = sandbox.start(&words, &[])?;
        let nonce = Talk::with(sandbox)
            .wait_ready()?
            .map_err(|verdict| Failure(format!("the guest says: {verdict:?}")))?;
        passes(sandbox, &nonce)
    });
}
