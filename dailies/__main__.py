"""The command `dailies`, and `python -m dailies`."""

from dailies.jobs.here import import_nothing_from_here


def command() -> None:
    """Before anything else is imported: a user's folder may have a json.py or a select.py."""
    try:  # noqa: SIM105  contextlib would be imported first
        import_nothing_from_here()
    except FileNotFoundError:
        pass                                            # it has been deleted: the command says so
    from dailies.jobs import cli
    cli.program()


if __name__ == "__main__":
    command()
