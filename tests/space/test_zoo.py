"""Published models as spaces of one point: their exact counts, by arithmetic."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from moenas import resources
from moenas.cli.commands import app
from moenas.grammar.sampling import RandomSuggest
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.space.space import Space

ZOO = Path(__file__).parents[2] / "spaces" / "zoo"

# Parameters and active parameters, as transformers 5.23.0 has them (tests/parity/test_counts.py);
# of the input embedding one row is active. The last column has the published number, in 1e9.
COUNTS = {
    "arctic": (478_584_608_768, 17_089_278_976, 480),
    "aria": (24_869_091_840, 3_858_252_800, 24.9),
    "dbrx": (131_596_523_520, 35_853_152_256, 132),
    "deepseek_moe_16b": (16_375_728_128, 2_618_937_344, 16.4),
    "deepseek_v2": (235_741_434_880, 20_851_517_440, 236),
    "deepseek_v2_lite": (15_706_484_224, 2_451_437_056, 15.7),
    "deepseek_v3": (671_026_404_352, 36_625_610_752, 671),
    "dots_llm1": (142_774_373_888, 13_393_731_072, None),
    "ernie_4_5_21b_a3b": (21_825_436_160, 3_352_148_480, None),
    "glam_64b_64e": (1_161_756_418_048, 96_604_528_640, None),
    "glm_4_5": (352_797_814_784, 32_856_310_784, None),
    "glm_4_5_air": (106_852_245_504, 12_803_371_008, None),
    "glm_4_7_flash": (29_943_390_976, 3_579_570_944, None),
    "gpt_oss_120b": (116_829_156_672, 5_132_852_352, 116.8),
    "gpt_oss_20b": (20_914_757_184, 3_608_310_144, 20.9),
    "granite_3_0_1b_a400m": (1_334_628_352, 428_658_688, None),
    "granite_4_0_h_small": (32_207_337_984, 8_803_121_664, None),
    "granite_4_0_h_tiny": (6_939_037_248, 1_465_470_528, None),
    "grok_1": (315_684_820_992, 83_756_587_008, None),
    "gshard": (13_152_602_112, 469_026_816, None),
    "hunyuan_a13b": (80_393_183_232, 12_747_448_320, 80),
    "hunyuan_large": (388_701_402_880, 51_322_074_880, 389),
    "jamba_1_5_large": (398_555_145_696, 93_612_475_872, 398),
    "jamba_v0_1": (51_570_323_328, 11_841_879_936, 51.6),
    "jetmoe_8b": (8_522_237_952, 2_331_445_248, None),
    "kimi_k2": (1_026_408_209_408, 31_687_079_936, None),
    "kimi_linear_48b_a3b": (49_122_675_072, 3_106_968_192, None),
    "lfm2_8b_a1b": (8_339_929_856, 1_557_740_288, 8.3),
    "ling_mini_2_0": (16_255_638_528, 1_111_057_408, None),
    "llama_4_maverick": (400_711_848_960, 16_150_210_560, 400),
    "llama_4_scout": (107_769_861_120, 16_138_414_080, None),
    "longcat_flash": (560_664_958_976, 27_149_496_320, 560),
    "mimo_v2_flash": (308_778_768_832, 14_820_977_088, 309),
    "minimax_m2": (228_689_748_992, 10_415_943_680, None),
    "minimax_text_01": (456_089_655_296, 47_174_119_424, 456),
    "mixtral_8x22b": (140_620_634_112, 38_955_429_888, 141),
    "mixtral_8x7b": (46_702_792_704, 12_748_857_344, 46.7),
    "moonlight_16b_a3b": (15_960_108_544, 2_579_232_256, None),
    "nemotron_3_nano": (31_577_937_344, 3_227_754_560, 31.6),
    "olmoe_1b_7b": (6_919_161_856, 1_178_996_736, 6.9),
    "pangu_pro_moe": (71_988_781_056, 15_712_859_136, 72),
    "phi_3_5_moe": (41_873_153_344, 6_509_669_696, 41.9),
    "qwen1_5_moe_a2_7b": (14_315_784_192, 2_378_010_624, 14.3),
    "qwen2_57b_a14b": (57_408_658_944, 13_704_735_744, None),
    "qwen3_235b_a22b": (235_093_634_560, 21_568_437_760, 235),
    "qwen3_30b_a3b": (30_532_122_624, 3_041_869_824, 30.5),
    "qwen3_5_35b_a3b": (34_660_610_688, 2_946_431_616, None),
    "qwen3_coder_480b_a35b": (480_154_875_392, 34_541_276_672, 480),
    "qwen3_next_80b_a3b": (79_674_391_296, 3_563_766_528, 80),
    "smallthinker_4b_a0_6b": (4_035_085_824, 864_192_000, None),
    "solar_open_100b": (102_651_793_408, 11_249_524_736, None),
    "step_3": (316_294_538_240, 37_917_989_888, 316),
    "switch_base_8": (307_846_272, 109_665_408, None),
    "trinity_mini": (26_123_970_560, 3_064_737_792, None),
}


def architecture(name: str) -> Architecture:
    space = Space.load(ZOO / f"{name}.yaml")
    assert space.size == 1
    assert [o.name for o in space.objectives] == [
        "active_params",
        "total_params",
        "flops_per_token",
    ]
    return space.architecture(space.draw(RandomSuggest(0)))


def test_every_model_of_the_zoo_is_counted() -> None:
    assert {path.stem for path in ZOO.iterdir()} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_the_counts_are_those_of_the_model(name: str) -> None:
    params, active, published = COUNTS[name]
    cost = architecture(name).cost(4096)
    assert (cost.params, cost.active_params) == (params, active)
    if published is not None:
        assert params == pytest.approx(published * 1e9, rel=5e-3)


def test_the_counts_of_gshard_are_those_of_its_coordinates() -> None:
    attention, expert, norms = 4 * 1024 * 2048, 2 * 1024 * 8192, 4 * 1024
    dense, experts = expert, 128 * expert + 128 * 1024
    rest = 64_000 * 1024 + 2 * 1024
    total = 6 * (2 * (attention + norms) + dense + experts) + rest
    assert total == COUNTS["gshard"][0]
    assert total - 6 * 126 * expert == COUNTS["gshard"][1]


def test_the_counts_of_grok_are_those_of_its_coordinates() -> None:
    attention, expert = 2 * 6144 * (48 + 8) * 128, 3 * 6144 * 32768
    rest = 131_072 * 6144 + 6144
    total = 64 * (attention + 8 * expert + 8 * 6144 + 4 * 6144) + rest
    assert COUNTS["grok_1"][:2] == (total, total - 64 * 6 * expert)


def test_the_counts_of_arctic_are_those_of_its_coordinates() -> None:
    attention, expert, beside = 2 * 7168 * (56 + 8) * 128, 3 * 7168 * 4864, 3 * 7168 * 7168
    table = 32_000 * 7168
    total = 35 * (attention + beside + 128 * (expert + 7168) + 3 * 7168) + 2 * table + 7168
    assert COUNTS["arctic"][:2] == (total, total - 35 * 126 * expert - table + 7168)


def test_the_counts_of_step_are_those_of_its_coordinates() -> None:
    heads, expert, table = 64 * 256, 3 * 7168 * 5120, 128_815 * 7168
    queries = 7168 * 2048 + 2048 + 2048 * heads
    layer = queries + 2 * 7168 * 256 + heads * 7168 + 2 * 7168
    rest = 5 * 3 * 7168 * 18_432 + 2 * table + 7168
    total = 61 * layer + 56 * (49 * expert + 48 * 7168) + rest
    assert COUNTS["step_3"][:2] == (total, total - 56 * 45 * expert - table + 7168)


def test_the_counts_of_ling_mini_are_those_of_its_coordinates() -> None:
    expert, table = 3 * 2048 * 512, 157_184 * 2048
    layer = 2 * 2048 * (16 + 4) * 128 + 2 * 128 + 2 * 2048
    total = 20 * layer + 3 * 2048 * 5120 + 19 * (257 * expert + 256 * 2048) + 2 * table + 2048
    assert COUNTS["ling_mini_2_0"][:2] == (total, total - 19 * 248 * expert - table + 2048)


def test_the_counts_of_hunyuan_large_are_those_of_its_coordinates() -> None:
    """In every second layer neither keys nor values are made, nor the norm of the keys."""
    expert, query = 3 * 6400 * 18_304, 2 * 6400 * 80 * 80 + 80
    keys = 2 * 6400 * 8 * 80 + 80
    layer = query + 17 * expert + 16 * 6400 + 2 * 6400
    total = 64 * layer + 32 * keys + 129_024 * 6400 + 6400
    assert COUNTS["hunyuan_large"][:2] == (total, total - 64 * 15 * expert)
    kept = architecture("hunyuan_large").cost(4096).kv_bytes_per_token
    assert kept == 32 * 2 * 2 * 8 * 80


def test_the_counts_of_glam_are_those_of_its_coordinates() -> None:
    """Published: 96.6e9 active parameters, which these are to 4 digits."""
    attention, expert, dense = 4 * 8192 * 128 * 128 + 32 * 128, 2 * 8192 * 32_768, 3 * 8192 * 32_768
    pair = 2 * (attention + 2 * 8192) + dense + 64 * (expert + 8192)
    total = 32 * pair + 256_000 * 8192 + 8192
    assert COUNTS["glam_64b_64e"][:2] == (total, total - 32 * 62 * expert)
    assert COUNTS["glam_64b_64e"][1] == pytest.approx(96.6e9, rel=5e-4)


def test_the_counts_of_pangu_are_those_of_its_coordinates() -> None:
    heads, expert, table = 5120 + 2 * 8 * 128, 3 * 5120 * 1344, 153_376 * 5120
    attention = 5120 * heads + heads + 5120 * 5120 + 5120
    layer = attention + 68 * expert + 5120 * 64 + 64 + 2 * 5120
    total = 48 * layer + 2 * table + 5120
    assert COUNTS["pangu_pro_moe"][:2] == (total, total - 48 * 56 * expert - table + 5120)


def test_the_counts_of_smallthinker_are_those_of_its_coordinates() -> None:
    attention, expert = 2 * 1536 * (12 + 2) * 128, 3 * 1536 * 768
    total = 32 * (attention + 32 * expert + 1536 * 32 + 2 * 1536) + 151_936 * 1536 + 1536
    assert COUNTS["smallthinker_4b_a0_6b"][:2] == (total, total - 32 * 28 * expert)


@pytest.mark.parametrize("name", COUNTS)
def test_the_written_out_point_is_the_same_point(name: str) -> None:
    point = architecture(name)
    assert point.canonical() == point
    text = resources.to_yaml(point.plain())
    again = Architecture.parse(resources.parse_yaml(text, name).plain)
    assert again == point
    assert again.fingerprint == point.fingerprint


def written_out(value: Any, layers: Plain) -> Any:
    """A space without names of layers, by the plainest replacement of words."""
    if isinstance(value, list):
        return [written_out(item, layers) for item in value]
    if isinstance(value, dict):
        named = layers[value["layer"]] if "layer" in value else {}
        both = {**named, **{key: item for key, item in value.items() if key != "layer"}}
        return {key: written_out(item, layers) for key, item in both.items()}
    return written_out(layers[value], layers) if value in layers else value


NAMED = [path.stem for path in sorted(ZOO.iterdir()) if "\nlayers:\n" in path.read_text()]


@pytest.mark.parametrize("name", NAMED)
def test_named_layers_do_not_change_a_fingerprint(name: str) -> None:
    written = resources.parse_yaml((ZOO / f"{name}.yaml").read_text(), name).plain
    plain = written_out(written["architecture"], written["layers"])
    assert Architecture.parse(plain).fingerprint == architecture(name).fingerprint


def test_no_two_models_have_one_fingerprint() -> None:
    assert len({architecture(name).fingerprint for name in COUNTS}) == len(COUNTS)


def test_check_counts_without_building_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(Architecture, "build", build)
    with pytest.raises(SystemExit) as end:
        app(["check", "zoo/kimi_k2", "-o", "json"])
    assert not end.value.code
    parsed = json.loads(capsys.readouterr().out)
    assert (parsed["params"], parsed["active_params"]) == COUNTS["kimi_k2"][:2]


def test_the_page_of_the_zoo_is_what_its_command_prints() -> None:
    page = runpy.run_path(str(ZOO.parents[1] / "benchmarks" / "zoo.py"))["page"]
    assert (ZOO.parents[1] / "docs" / "zoo.md").read_text(encoding="utf-8") == page()
