"""Bad input ends the start of a real server with one clear error; the cases themselves are in the hook's tests."""

import pytest


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--kvtuner-q-group-size", "48"], "--kvtuner-q-group-size is 48 with --kvtuner-axis-key 0"),
        (["--kvtuner-config", "{preset}"], "line 2: nbits_key of layer 0 is '3'; valid are 2, 4, 8, 16"),
    ],
)
def test_server_stops_with_the_flag_and_the_reason(smollm2_checkpoint, launch_server, tmp_path, flags, message):
    preset = tmp_path / "preset.yaml"
    preset.write_text("0:\n  nbits_key: 3\n  nbits_value: 4\n")
    flags = [flag.format(preset=preset) for flag in flags]
    with launch_server(smollm2_checkpoint, "--enable-kvtuner-quant", *flags, wait=False) as server:
        with pytest.raises(Exception, match="exit status"):
            server.wait_until_healthy()
        assert message in server.log_text()
