"""Compute and judge what five lectures on convolutional networks state about them.

    python -m experiments.claims --workdir runs/claims

Writes report.md, claims.json, and four figures. Lectures: WPI CS 539, UBC CPSC 532S (lecture 6),
UTSA EE 6973, NUS CS5242 (lecture 8), Inha. Statements are put in our own words. Claims about
trained networks are judged by committed results (experiments/claims/measured.json); nothing is
trained.
"""

import dataclasses
import sys

from cnnjax.runtime import backend, command, files, workdir


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(prog="python -m experiments.claims", description=__doc__)
    parser.add_workdir("runs/claims")
    folder = parser.parse_args(arguments).workdir

    def work():
        backend.start()
        # Imported late, because these import jax and --help does not need it.
        from experiments.claims import figures, report
        from experiments.claims.ledger import check_claims
        from experiments.claims.sections import SECTIONS

        record = {"command": "claims"}
        with workdir.prepared(folder, record, unrecorded="claims.json"):
            findings = check_claims(claim for section in SECTIONS for claim in section.claims)
            records = [dataclasses.asdict(finding) for finding in findings]
            files.write_json(folder / "claims.json", records)
            for name, draw in figures.FIGURES.items():
                files.write_figure(folder / name, draw())
            files.write(folder / "report.md", report.render(SECTIONS, findings))
        print(f"{report.summary(findings)}\n{len(findings)} claims: see {folder / 'report.md'}")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
