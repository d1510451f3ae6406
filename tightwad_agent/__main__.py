"""`python -m tightwad_agent` and the `tightwad-agent` command."""

import sys


def main() -> None:
    """Run the command line; exits the process."""
    try:
        from tightwad_agent import hide_token

        sys.argv[1:] = hide_token.from_argv(sys.argv[1:])
        from tightwad_agent.cli import cli

        cli(prog_name="tightwad-agent")
    except KeyboardInterrupt:  # while modules were loaded; later ones are `cli_base`'s
        sys.exit(130)


if __name__ == "__main__":
    main()
