"""The engine side of inpainting: every claim exact, with a control that must fail."""

import pytest
import torch

from dmd_core import inpaint, shapes
from dmd_core.inpaint import canvas as canvas_file
from dmd_core.inpaint import crop, masks, strokes


def disc(h=48, w=64, y=20, x=30, r=9):
    yy, xx = torch.arange(h)[:, None], torch.arange(w)[None]
    return (((yy - y) ** 2 + (xx - x) ** 2) <= r * r).float()[None]


def noise_image(rng, b=1, h=48, w=64):
    return torch.rand(b, 3, h, w, generator=rng)


# --- bad input ---


@pytest.mark.parametrize(
    ("image", "mask", "says"),
    [
        (torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 9), r"8 x 8 and the mask 9 x 8"),
        (torch.rand(3, 3, 8, 8), torch.zeros(2, 8, 8), r"3 images and 2 masks"),
        (torch.full((1, 3, 8, 8), torch.nan), torch.zeros(1, 8, 8), "image holds NaN"),
        (torch.rand(1, 3, 8, 8), torch.full((1, 8, 8), torch.inf), "mask holds NaN or infinite"),
        (torch.rand(1, 3, 8, 8), torch.full((1, 8, 8), 1.5), "0 to 1"),
        (torch.rand(3, 8, 8), torch.zeros(1, 8, 8), r"must be \[b c h w\]"),
    ],
)
def test_bad_input_is_named(image, mask, says):
    with pytest.raises(ValueError, match=says):
        inpaint.check(image, mask)


def test_one_mask_serves_a_batch():
    assert inpaint.check(torch.rand(3, 3, 8, 8), torch.ones(1, 8, 8)).shape == (3, 8, 8)


# --- masks ---


def test_stabilise_rounds_only_the_ends():
    mask = torch.tensor([[[0.0, 0.02, 0.5, 0.99, 1.0]]])
    assert masks.stabilise(mask).tolist() == [[[0.0, 0.0, 0.5, 1.0, 1.0]]]


def test_grow_then_shrink_returns_a_box_and_shrinking_first_does_not():
    box = torch.zeros(1, 20, 20)
    box[:, 8:12, 8:12] = 1
    assert masks.dilate(box, 3).sum() == 100
    assert torch.equal(masks.dilate(masks.dilate(box, 3), -3), box)
    assert masks.dilate(masks.dilate(box, -3), 3).sum() == 0


def test_softening_keeps_the_hole_full_and_ends_in_exact_zeros():
    mask = disc()
    soft = masks.soften(mask, 4)
    assert torch.equal(soft[mask == 1], mask[mask == 1])
    between = (soft > 0) & (soft < 1)
    assert between.any()
    assert not (between & (masks.dilate(mask, 8) == 0)).any()


def test_a_closed_outline_is_filled_and_an_open_one_is_not():
    outline = disc(r=12) - disc(r=9)
    filled = masks.fill_holes(outline)
    assert torch.equal(filled, disc(r=12))
    opened = outline.clone()
    opened[:, 20, 31:] = 0
    assert torch.equal(masks.fill_holes(opened), opened)


def test_islands_are_counted_and_a_spiral_is_one():
    two = disc(x=12, r=5) + disc(x=50, r=5)
    assert inpaint.islands(two).unique().tolist() == [0, 1, 2]
    two[:, 20, 12:50] = 1
    assert inpaint.islands(two).max() == 1
    spiral = torch.zeros(1, 9, 9)
    path = "rrrrrrrrddddddddlllllllluuuuuurrrrrrddddlllluurr"
    y = x = 0
    for step in path:
        y, x = y + (step == "d") - (step == "u"), x + (step == "r") - (step == "l")
        spiral[0, y, x] = 1
    assert inpaint.islands(spiral).max() == 1
    spiral[0, 4, 8] = 0
    assert inpaint.islands(spiral).max() == 2


def test_the_ring_is_known_and_next_to_the_hole():
    mask = disc()
    around = inpaint.ring(mask, 3)
    assert not (around & (mask > 0)).any()
    assert torch.equal(around | (mask > 0), masks.dilate(mask, 3) > 0)


# --- tokens and cost ---


def test_one_masked_pixel_touches_its_token_and_no_other():
    latent = torch.zeros(2, 1, 16, 24)
    latent[1, 0, 5, 9] = 1e-3
    touched = inpaint.token_mask(latent, (1, 2, 2))
    assert touched.shape == (1, 8, 12)
    assert touched.nonzero().tolist() == [[0, 2, 4]]


def test_an_odd_latent_has_its_cut_tokens():
    latent = torch.zeros(1, 1, 5, 5)
    latent[..., 4, 4] = 1
    assert inpaint.token_mask(latent, (1, 2, 2)).nonzero().tolist() == [[0, 2, 2]]


def test_selection_is_hole_ring_and_the_nearest_up_to_the_multiple():
    touched = torch.zeros(1, 16, 16, dtype=torch.bool)
    touched[0, 8, 8] = True
    bare = inpaint.select(touched, ring=0, multiple=1)
    assert bare.computed.sum() == 1
    ringed = inpaint.select(touched, ring=1, multiple=1)
    assert ringed.computed.sum() == 9
    rounded = inpaint.select(touched, ring=1, multiple=16)
    assert rounded.computed.sum() == 16
    where = rounded.computed.reshape(16, 16).nonzero()
    assert (where - 8).abs().max() == 2  # the padding comes from the next ring, not from the corner
    assert rounded.share == 16 / 256
    assert inpaint.select(touched, ring=1, multiple=64).share == 16 / 256  # 64 of 256 would be a quarter
    assert int(rounded.hole.sum()) == 1


def test_selection_never_asks_for_more_tokens_than_there_are():
    touched = torch.ones(1, 5, 5, dtype=torch.bool)
    assert inpaint.select(touched, multiple=64).computed.all()
    nothing = inpaint.select(torch.zeros(1, 5, 5, dtype=torch.bool))
    assert not nothing.computed.any()


def test_frames_have_their_own_rings():
    touched = torch.zeros(3, 8, 8, dtype=torch.bool)
    touched[1, 4, 4] = True
    chosen = inpaint.select(touched, ring=1, multiple=1).computed.reshape(3, 8, 8)
    assert chosen.sum((1, 2)).tolist() == [0, 9, 0]


def test_the_cost_law():
    assert inpaint.step_cost(1.0, 4096, 333) == 1
    assert inpaint.step_cost(0.1, 4096, 333) == pytest.approx(0.1677, abs=1e-4)  # the table's SD3.5 at T = 333
    assert inpaint.step_cost(0.1, 4096, 0) == pytest.approx(0.1)
    assert inpaint.run_cost(0.15, 1, 0, 20, 6) == pytest.approx((6 + 14 * 0.15) / 20)
    with pytest.raises(ValueError, match="0 to 1"):
        inpaint.step_cost(1.2, 10, 1)


def test_dense_steps_warm_up_and_come_back():
    assert sorted(inpaint.dense_steps(20, warm=3, every=5)) == [0, 1, 2, 7, 12, 17]
    with pytest.raises(ValueError, match="at least 1"):
        inpaint.dense_steps(20, warm=0)


# --- prefill ---


@pytest.mark.parametrize("kind", inpaint.PREFILLS)
def test_prefill_keeps_the_known_to_the_bit_and_hides_the_hole(kind, rng):
    image, mask = noise_image(rng, 2), disc().expand(2, -1, -1)
    filled = inpaint.prefill(image, mask, kind)
    other = torch.where(mask[:, None] > 0, torch.rand(image.shape, generator=rng), image)
    known = (mask == 0)[:, None].expand_as(image)
    assert torch.equal(filled[known], image[known])
    assert torch.allclose(inpaint.prefill(other, mask, kind), filled, atol=1e-6)  # what was in the hole has no say
    assert torch.isfinite(filled).all()
    assert torch.isfinite(inpaint.prefill(image, torch.ones_like(mask), kind)).all()


def test_push_pull_continues_a_ramp_where_the_mean_does_not():
    ramp = torch.linspace(0.1, 0.9, 64).expand(1, 3, 48, 64).contiguous()
    mask = disc()
    inside = (mask > 0)[:, None].expand_as(ramp)
    error = {k: (inpaint.prefill(ramp, mask, k) - ramp)[inside].abs().mean().item() for k in inpaint.PREFILLS}
    assert error["push-pull"] < 0.03
    assert error["push-pull"] < 0.5 * error["mean"]


def test_prefill_of_a_constant_is_the_constant():
    image = torch.full((1, 3, 31, 45), 0.3)
    mask = torch.zeros(1, 31, 45)
    mask[:, 5:30, 2:40] = 1
    for kind in ("push-pull", "blur", "mean"):
        assert torch.allclose(inpaint.prefill(image, mask, kind), image, atol=1e-5), kind
    with pytest.raises(ValueError, match="push-pull, blur"):
        inpaint.prefill(image, mask, "lama")


# --- crops ---


def test_a_crop_at_the_edge_is_moved_inside_and_holds_its_island():
    mask = torch.zeros(1, 128, 128)
    mask[:, 0:10, 120:128] = 1
    (box,) = inpaint.crops(mask, factor=2.0, multiple=16)
    assert (box.top, box.left + box.width) == (0, 128)
    assert box.height % 16 == 0
    assert box.width % 16 == 0
    assert box.of(mask).sum() == mask.sum()


def test_distant_islands_get_their_own_crops_near_ones_share_and_one_box_can_be_asked_for():
    far = torch.zeros(1, 128, 256)
    far[:, 10:20, 10:20] = 1
    far[:, 100:112, 230:250] = 1
    boxes = inpaint.crops(far)
    assert len(boxes) == 2
    assert len({(b.height, b.width) for b in boxes}) == 1
    assert sum(b.area for b in boxes) < 0.2 * far.numel()
    assert len(inpaint.crops(far, separate=False)) == 1
    near = torch.zeros(1, 128, 256)
    near[:, 10:20, 10:20] = near[:, 10:20, 24:34] = 1
    assert len(inpaint.crops(near)) == 1


@pytest.mark.parametrize(
    ("size", "hole", "usual", "wanted"),
    [
        ((2048, 2048), (100, 100), 1024, (1024, 1024)),  # was 166 x 166: far below what SDXL draws
        ((2048, 2048), (100, 100), 512, (512, 512)),
        ((2048, 2048), (100, 100), 0, (176, 176)),  # an unknown model: only the context
        ((768, 768), (100, 100), 1024, (768, 768)),  # all there is
        ((512, 4096), (100, 100), 1024, (512, 2048)),
        ((4096, 512), (100, 100), 1024, (2048, 512)),
        ((256, 4096), (100, 100), 1024, (256, 2048)),  # no more than 4 to 1
        ((2048, 2048), (100, 1300), 1024, (544, 1968)),
        ((2048, 2048), (1000, 1000), 1024, (1520, 1520)),  # large enough by itself
    ],
)
def test_a_crop_is_as_large_as_what_the_model_draws(size, hole, usual, wanted):
    mask = torch.zeros(1, *size)
    top, left = (size[0] - hole[0]) // 2, (size[1] - hole[1]) // 3
    mask[:, top : top + hole[0], left : left + hole[1]] = 1
    (box,) = inpaint.crops(mask, 1.5, 16, usual=usual)
    assert (box.height, box.width) == wanted
    assert box.of(mask).sum() == mask.sum()
    assert box.top >= 0
    assert box.top + box.height <= size[0]
    assert box.left + box.width <= size[1]


def test_what_the_picture_cannot_give_is_enlarged_for_sampling():
    def at(height, width):
        return crop.enlarged(inpaint.Box(0, 0, 0, height, width), 1024, 16)

    assert at(224, 224) == (1024, 1024)
    assert at(512, 256) == (1456, 720)  # a million pixels in its own shape
    assert at(1024, 1024) is at(960, 960) is None  # near enough
    assert at(2048, 2048) is None  # nothing is made smaller
    assert crop.enlarged(inpaint.Box(0, 0, 0, 64, 64), 0, 16) is None
    picture = torch.linspace(0, 1, 64)[None, None, None].expand(1, 3, 48, 64).clone()
    there = crop.resized(picture, (208, 272))
    assert (crop.resized(there, (48, 64)) - picture).abs().max() < 0.01
    assert crop.resized(picture, (48, 64)) is picture


def test_every_hole_pixel_is_in_a_crop(rng):
    drawn = inpaint.draw_masks(12, 96, 128, rng)
    covered = torch.zeros_like(drawn)
    for box in inpaint.crops(drawn):
        box.of(covered).fill_(1)
    assert not ((drawn > 0) & (covered == 0)).any()


def test_cut_and_paste_return_the_picture_and_an_empty_mask_has_no_crop(rng):
    image = noise_image(rng, 2)
    mask = torch.cat([disc(), torch.zeros(1, 48, 64)])
    boxes = inpaint.crops(mask)
    assert {b.index for b in boxes} == {0}
    assert torch.equal(inpaint.paste(torch.where(mask[:, None] > 0, 0.0, image), crop.cut(image, boxes), boxes), image)
    assert inpaint.crops(torch.zeros(2, 48, 64)) == []
    with pytest.raises(ValueError, match="one per region"):
        inpaint.paste(image, image[:0], boxes)


# --- composite ---


@pytest.mark.parametrize("feather", [0.0, 3.0])
@pytest.mark.parametrize("soft", [0, 5])
def test_outside_the_mask_nothing_changes(feather, soft, rng):
    mask = masks.soften(disc(), soft).expand(2, -1, -1)
    image = noise_image(rng, 2)
    out = inpaint.composite(image, noise_image(rng, 2), mask, feather)
    outside = (mask == 0)[:, None].expand_as(image)
    assert (out - image)[outside].abs().max() == 0
    assert (out - image)[~outside].abs().max() > 0.1


def test_the_hole_is_fully_replaced_without_feather(rng):
    image, new, mask = noise_image(rng), noise_image(rng), disc()
    out = inpaint.composite(image, new, mask)
    inside = (mask == 1)[:, None].expand_as(image)
    assert torch.equal(out[inside], new[inside])


def test_a_feathered_line_of_one_pixel_still_shows():
    mask = torch.zeros(1, 48, 64)
    mask[:, 24, 5:60] = 1
    alpha = inpaint.fade(mask, 8.0)
    assert alpha.max() == 1
    assert (alpha[mask == 0] == 0).all()


def test_fading_rises_inwards_and_not_towards_the_edge_of_the_picture():
    mask = torch.zeros(1, 48, 64)
    mask[:, :, :30] = 1
    alpha = inpaint.fade(mask, 6.0)[0, 24]
    assert alpha[0] == 1
    assert (alpha[20:30].diff() <= 0).all()
    assert alpha[29] < 0.4


def test_a_planted_colour_shift_is_undone_whatever_is_in_the_hole(rng):
    image, mask = noise_image(rng, 2), disc().expand(2, -1, -1)
    gain, offset = torch.tensor([0.8, 1.1, 0.95])[:, None, None], torch.tensor([0.05, -0.1, 0.02])[:, None, None]
    shifted = image * gain + offset
    shifted = torch.where(mask[:, None] > 0, 7.0, shifted)  # garbage inside must not count
    matched = inpaint.match_ring(shifted, image, mask)
    outside = (mask == 0)[:, None].expand_as(image)
    assert torch.allclose(matched[outside], image[outside], atol=1e-5)
    assert (shifted - image)[outside].abs().max() > 0.05


def test_a_ring_that_is_too_small_changes_nothing(rng):
    image = noise_image(rng)
    assert torch.equal(inpaint.match_ring(image * 0.5, image, torch.ones(1, 48, 64)), image * 0.5)


def seam(image, mask):
    """Mean step across the border of the mask over the mean step between its neighbours outside."""
    hole = mask[0] > 0
    steps = (image[0, :, :, 1:] - image[0, :, :, :-1]).abs().mean(0)
    border = hole[:, 1:] ^ hole[:, :-1]
    near = (masks.dilate(mask, 4)[0] > 0) & ~hole
    return (steps[border].mean() / steps[near[:, 1:] & near[:, :-1]].mean()).item()


def test_no_seam_on_a_smooth_picture_and_one_where_colours_are_not_matched():
    y, x = torch.linspace(0, 6, 96)[:, None], torch.linspace(0, 6, 128)[None]
    smooth = torch.stack(
        [0.5 + 0.3 * (x + y).sin(), 0.5 + 0.3 * (x - 0.5 * y).cos(), 0.5 + 0.2 * (0.7 * x).sin() + 0 * y]
    )
    image, mask = smooth[None], masks.soften(disc(96, 128, 48, 64, 20), 4)
    shifted = 0.9 * image + 0.02
    assert seam(image, mask) == pytest.approx(1, abs=0.1)
    matched = inpaint.composite(image, inpaint.match_ring(shifted, image, mask), mask)
    assert seam(matched, mask) == pytest.approx(seam(image, mask), rel=0.1)
    hard = disc(96, 128, 48, 64, 20)
    assert seam(inpaint.composite(image, shifted, hard), hard) > 1.2


# --- mask sampler ---


def test_masks_are_binary_reproducible_and_stratified_by_area(rng):
    config = inpaint.MaskConfig(outpaint=0, crops=0, all=0, boxes=0)
    drawn = inpaint.draw_masks(32, 64, 64, rng, config)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    again = inpaint.draw_masks(32, 64, 64, torch.Generator().manual_seed(0), config)
    assert torch.equal(drawn, again)
    areas = drawn.mean((1, 2)).log().sort().values
    low, high = torch.tensor(config.least).log(), torch.tensor(config.most).log()
    place = (areas - low) / (high - low) * 32
    assert (place - torch.arange(32) - 0.5).abs().max() < 1.0  # one area in each of the 32 strata


def test_every_kind_is_drawn_with_about_its_area(rng):
    for draw in (strokes._strokes, strokes._blobs, strokes._boxes, strokes._outpaint):
        for area in (0.15, 0.5):
            share = torch.stack([draw(64, 80, area, rng) for _ in range(8)]).mean((1, 2))
            assert (share > 0).all(), draw.__name__
            assert 0.4 * area < share.mean() < 1.4 * area, (draw.__name__, area, share.mean())


def test_outpainting_masks_leave_one_box_and_touch_the_border(rng):
    for _ in range(8):
        mask = strokes._outpaint(64, 64, 0.4, rng)
        kept = inpaint.box_of(mask == 0)
        assert kept is not None
        assert kept.area == int((mask == 0).sum())
        assert mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()


def test_mask_areas_must_make_sense(rng):
    with pytest.raises(ValueError, match="rise"):
        inpaint.draw_masks(2, 8, 8, rng, inpaint.MaskConfig(least=0.5, most=0.1))


# --- bank ---


def filled_bank(rng, **limits):
    bank = inpaint.Bank(10, **limits)
    everything = torch.arange(10)
    for key in ("a", "b"):
        for slot in (0, 1):
            k, v = torch.randn(2, 1, 2, 10, 4, generator=rng)
            bank.write(key, slot, k, v, everything)
        bank.wrote(key, everything)
    return bank


def rows(bank):
    everything, cpu = torch.arange(10), torch.device("cpu")
    return [t.clone() for key in ("a", "b") for slot in (0, 1) for t in bank.read(key, slot, everything, cpu)]


def edit(bank, tokens, rng):
    bank.begin(tokens)
    for key in ("a", "b"):
        for slot in (0, 1):
            bank.sketch(key, slot, *torch.randn(2, 1, 2, len(tokens), 4, generator=rng))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_accept_changes_the_edited_rows_only_and_undo_restores_all_to_the_bit(rng):
    bank = filled_bank(rng)
    first, tokens = rows(bank), torch.tensor([2, 5, 6])
    edit(bank, tokens, rng)
    assert same(rows(bank), first)  # a draft is not yet context
    assert bank.accept()
    second = rows(bank)
    changed = [(x != y).any(-1).any(0).any(0) for x, y in zip(first, second, strict=True)]
    assert all(c.nonzero().flatten().tolist() == [2, 5, 6] for c in changed)
    edit(bank, torch.tensor([6, 7]), rng)
    assert bank.accept()
    assert bank.undo()
    assert same(rows(bank), second)
    assert bank.undo()
    assert same(rows(bank), first)
    assert not bank.undo()
    assert not bank.accept()


def test_rows_count_only_once_a_pass_is_complete_and_stale_ones_are_forgotten(rng):
    bank = inpaint.Bank(10)
    bank.write("a", 0, torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.tensor([1, 2, 3]))
    assert not bank.have(["a"]).any()
    bank.wrote("a", torch.tensor([1, 2, 3]))
    assert bank.have(["a"]).nonzero().flatten().tolist() == [1, 2, 3]
    assert not bank.have(["a", "b"]).any()
    bank.forget(torch.arange(10) == 2)
    assert bank.have(["a"]).nonzero().flatten().tolist() == [1, 3]


def test_an_edit_that_lacks_a_level_makes_that_level_forget_it(rng):
    bank = filled_bank(rng)
    bank.begin(torch.tensor([4]))
    bank.sketch("a", 0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    bank.sketch("a", 1, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    bank.accept()
    assert bank.have(["a"]).all()
    assert not bank.have(["b"])[4]
    bank.undo()
    assert bank.have(["a", "b"]).all()


def test_memory_is_counted_and_bounded(rng):
    bank = filled_bank(rng)
    assert sum(bank.nbytes) == 2 * 2 * 2 * (2 * 10 * 4 * 4)
    with pytest.raises(inpaint.BankFull, match="GiB"):
        filled_bank(rng, fast_gib=1000 / 2**30, slow_gib=0)
    spilled = filled_bank(rng, fast_gib=0.0, slow_gib=1.0)
    assert same(rows(spilled), rows(spilled))
    bank.clear()
    assert sum(bank.nbytes) == 0


# --- latents kept between edits ---


def test_banks_share_one_limit_and_neighbours_are_dropped_before_it_is_refused(rng):
    """k and v of ten tokens, 2 heads, 8 wide: 1280 bytes."""

    class Shelf:
        def __init__(self):
            self.others = [2000, 2000]

        def used(self):
            return sum(self.others), 0

        def drop(self):
            return bool(self.others) and self.others.pop(0) > 0

    def bank(gib, shelf):
        made = inpaint.Bank(10, gib, 0.0, neighbours=shelf)
        rows = torch.randn(1, 2, 10, 8, generator=rng)
        made.write("key", "slot", rows, rows, torch.arange(10))
        return made

    own, shelf = 1280, Shelf()
    assert bank((own + 4000) / 2**30, shelf).taken == (own, 0)
    assert shelf.others == [2000, 2000]  # there was room for all
    assert bank((own + 2000) / 2**30, shelf).taken == (own, 0)
    assert shelf.others == [2000]
    with pytest.raises(inpaint.BankFull):
        bank((own - 1) / 2**30, shelf)
    assert shelf.others == []
    bank(own / 2**30, None)


def tone_encoder(pixels):
    """Three cells of reach, and a tone that depends on all it sees, as with an autoencoder's normalisation."""
    cells = torch.nn.functional.avg_pool2d(pixels, 8)
    near = torch.nn.functional.avg_pool2d(cells, 3, 1, 1, count_include_pad=False)
    return torch.cat([near, cells - near], 1) * (1 + 0.2 * pixels.mean((1, 2, 3), keepdim=True))


def edited_photo(rng, size=512):
    y, x = torch.linspace(0, 7, size)[:, None], torch.linspace(0, 5, size)[None]
    first = torch.stack([0.5 + 0.4 * (x * k + y).sin() for k in (1.0, 1.7, 0.6)])[None].repeat(2, 1, 1, 1)
    first = first + 0.05 * torch.randn(first.shape, generator=rng)
    second = first.clone()
    second[0, :, 200:260, 300:340] = 0.9
    return first, second


def test_a_second_encoding_computes_the_change_alone_and_keeps_the_rest_to_the_bit(rng, monkeypatch):
    first, second = edited_photo(rng)
    seen = []

    def encode(pixels):
        seen.append(pixels.numel())
        return tone_encoder(pixels)

    canvas = inpaint.Canvas()
    before = canvas.encode(first, 8, encode)
    assert torch.equal(before, tone_encoder(first))
    after, whole = canvas.encode(second, 8, encode), tone_encoder(second)
    changed = (second != first).any(1, keepdim=True).float()
    near = masks.dilate(torch.nn.functional.max_pool2d(changed, 8)[:, 0], 4).bool()[:, None].expand_as(after)
    assert torch.equal(after[~near], before[~near])
    assert seen[1] < 0.25 * seen[0] == 0.25 * first.numel()
    assert canvas.share == pytest.approx(seen[1] / seen[0])
    scale = whole.std()
    assert (after - whole)[near].abs().mean() < 0.02 * scale
    assert torch.equal(canvas.encode(second, 8, encode), after)
    assert len(seen) == 2  # nothing changed, nothing was encoded
    assert torch.equal(canvas.encode(0.5 * second, 8, encode), tone_encoder(0.5 * second))  # all changed: all encoded
    # control: without the ring's tone the crop is off
    monkeypatch.setattr(canvas_file, "match_ring", lambda parts, *_args, **_options: parts)
    canvas.encode(first, 8, encode)
    bare = canvas.encode(second, 8, encode)
    assert (bare - whole)[near].abs().mean() > 3 * (after - whole)[near].abs().mean()


def test_a_latent_with_one_frame_is_local_too_and_a_video_is_encoded_whole(rng):
    first, second = edited_photo(rng)
    single, plain = inpaint.Canvas(), inpaint.Canvas()
    for picture in (first, second):
        framed = single.encode(picture, 8, lambda p: tone_encoder(p)[:, :, None])
        flat = plain.encode(picture, 8, tone_encoder)
    assert single.share < 0.25
    assert torch.equal(framed[:, :, 0], flat)
    video = inpaint.Canvas()
    for picture in (first, second):
        out = video.encode(picture, 8, lambda p: tone_encoder(p).movedim(0, 1)[None])
        assert video.share == 1
        assert torch.equal(out[0].movedim(0, 1), tone_encoder(picture))


def test_the_shapes_autoencoder_agrees_with_its_crops(rng):
    vae = shapes.load_autoencoder()
    first, second = edited_photo(rng, 384)
    canvas = inpaint.Canvas()
    canvas.encode(first[:1], 8, lambda p: vae.encode(2 * p - 1))
    after, whole = canvas.encode(second[:1], 8, lambda p: vae.encode(2 * p - 1)), vae.encode(2 * second[:1] - 1)
    assert canvas.share < 0.6
    assert (after - whole).abs().mean() < 0.01 * whole.std()
    assert (after - whole).abs().max() < 0.1 * whole.std()
