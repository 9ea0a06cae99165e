"""What the built-in shop sells: brands with their lines, kinds of product, and the words that qualify them. Data only, no code.

Within every list the frequent come first: the generator draws from the head far more often than from the tail.
"""

from __future__ import annotations

from typing import NamedTuple


class Shelf(NamedTuple):
    """One category."""

    brands: dict[str, list[str]]
    """Brand -> its lines."""
    kinds: list[str]
    """What the thing is called."""
    traits: list[list[str]]
    """Groups of qualifiers; a query takes at most one of each group."""
    uses: list[str]
    """What follows "for"."""
    extras: list[str]
    """What is searched for beside the thing itself."""
    prices: range
    """Round prices people name."""


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _brands(text: str) -> dict[str, list[str]]:
    pairs = (line.split(":") for line in text.strip().splitlines())
    return {brand.strip(): _words(lines) for brand, lines in pairs}


_COLOURS = _words(
    "black, white, blue, silver, red, grey, green, pink, gold, purple, "
    "navy, beige, brown, yellow, orange, rose gold, space grey, ivory, teal"
)
_STORAGE = _words("128gb, 64gb, 256gb, 512gb, 32gb, 1tb, 2tb")
_SIZES = _words("medium, large, small, xl, xxl, xs, 3xl, size 10, size 8, size 12, size 9, size 11, size 7, size 6, size 14")

SHELVES: dict[str, Shelf] = {
    "Mobile Phones": Shelf(
        _brands(
            """apple: iphone 8, iphone x, iphone 11, iphone 12, iphone se, iphone 13 pro, iphone 14 pro max, iphone 7 plus
            samsung: galaxy s9, galaxy s10, galaxy a52, galaxy s21 ultra, galaxy note 9, galaxy a12, galaxy z flip, galaxy m31
            huawei: p30 pro, p20 lite, mate 20, p smart, nova 5t
            xiaomi: redmi note 9, mi 11, poco x3, redmi 9a, mi a3
            nokia: 3310, 6.1 plus, 8.3, 105
            oneplus: nord, 8t, 9 pro, 7t
            google: pixel 4a, pixel 6, pixel 3 xl
            motorola: moto g8, edge 20, moto e7, razr
            sony: xperia 5, xperia l3, xperia 10 ii
            doro: 8050, 1370
            cat: s61, b35"""
        ),
        _words("smartphone, mobile phone, phone, sim free phone, android phone, 5g phone, big button phone, flip phone"),
        [
            _STORAGE,
            _COLOURS,
            _words("unlocked, sim free, dual sim, refurbished, used, pay as you go"),
            _words("5g, 4g, 6gb ram, 8gb ram, 48mp, fast charging"),
        ],
        _words("seniors, kids, gaming, photography, work, travel"),
        _words("case, screen protector, charger, cover, back cover, battery, wallet case, car holder"),
        range(50, 1000, 50),
    ),
    "Televisions": Shelf(
        _brands(
            """samsung: qled q60, crystal tu7100, the frame, neo qled qn90
            lg: oled c1, nanocell 81, un7300, oled b9
            sony: bravia x80, bravia a8, bravia xh90
            panasonic: viera hx800, oled gz950
            philips: ambilight 6500, the one
            hisense: a7100, u7, roku r6
            tcl: c715, p610
            toshiba: fire tv, uk31
            loewe: bild 3, connect
            sharp: aquos bj2"""
        ),
        _words("tv, smart tv, led tv, oled tv, 4k tv, television, curved tv, qled tv"),
        [
            _words("55 inch, 50 inch, 43 inch, 65 inch, 32 inch, 40 inch, 75 inch, 24 inch, 49 inch, 85 inch"),
            _words("4k, uhd, full hd, 8k, hd ready, hdr"),
            _words("smart, android, freeview, with dvd player, wall mounted, 120hz, with alexa"),
            _words("black, silver, white"),
        ],
        _words("bedroom, kitchen, gaming, living room, caravan"),
        _words("wall bracket, stand, remote, soundbar, hdmi cable, cabinet"),
        range(100, 2000, 100),
    ),
    "Laptops": Shelf(
        _brands(
            """hp: pavilion 15, envy 13, omen, elitebook 840, spectre x360, stream 14
            dell: xps 13, inspiron 15, latitude 5400, g5, vostro
            lenovo: thinkpad x1, ideapad 3, yoga slim 7, legion 5, thinkpad t480
            apple: macbook air, macbook pro 13, macbook pro 16
            asus: vivobook 15, zenbook 14, rog strix, tuf gaming
            acer: aspire 5, swift 3, nitro 5, chromebook 314, predator
            microsoft: surface laptop, surface go
            msi: gf63, katana, modern 14
            razer: blade 15
            huawei: matebook d"""
        ),
        _words("laptop, notebook, gaming laptop, chromebook, ultrabook, 2 in 1 laptop, touchscreen laptop"),
        [
            _words("8gb ram, 16gb ram, 4gb ram, 32gb ram"),
            _words("256gb ssd, 512gb ssd, 1tb ssd, 128gb ssd, 1tb hdd"),
            _words("i5, i7, ryzen 5, i3, ryzen 7, m1, celeron, i9"),
            _words("15.6 inch, 14 inch, 13 inch, 17 inch, 11 inch"),
            _words("windows 10, refurbished, touchscreen, backlit keyboard, rtx 3060, windows 11"),
            _COLOURS,
        ],
        _words("students, gaming, work, video editing, programming, kids, office, music production"),
        _words("bag, charger, sleeve, stand, docking station, cooling pad, ssd upgrade, battery"),
        range(200, 2500, 100),
    ),
    "Shoes": Shelf(
        _brands(
            """nike: air force 1, air max 90, revolution 5, pegasus 38, dunk low, blazer mid
            adidas: ultraboost, stan smith, superstar, gazelle, nmd r1, runfalcon
            puma: suede classic, rs-x, smash v2
            new balance: 574, 990, fresh foam 1080, 327
            converse: chuck taylor all star, run star hike
            vans: old skool, sk8-hi, authentic
            asics: gel kayano, gel nimbus, gel contend
            skechers: go walk, d'lites, arch fit
            clarks: desert boot, tilden, unloop
            timberland: 6 inch premium, euro sprint
            salomon: speedcross 5, xa pro
            crocs: classic clog"""
        ),
        _words(
            "shoes, running shoes, trainers, sneakers, boots, sandals, "
            "football boots, walking shoes, slippers, heels, loafers, ankle boots, flip flops"
        ),
        [
            _COLOURS,
            _words("mens, womens, kids, boys, girls, unisex, toddler"),
            _words("size 9, size 8, size 7, size 10, size 6, size 11, size 5, size 12, size 4"),
            _words("leather, waterproof, wide fit, suede, canvas, memory foam, slip on, high top"),
        ],
        _words("running, gym, hiking, school, wedding, work, flat feet, tennis, trail running"),
        _words("laces, insoles, cleaner, rack, box"),
        range(20, 200, 10),
    ),
    "Dresses": Shelf(
        _brands(
            """zara: satin midi, ribbed, poplin
            h&m: jersey, puff sleeve, wrap
            mango: linen, pleated, shirt
            asos: bodycon, plunge, skater
            boohoo: slinky, frill, cut out
            monsoon: embroidered, occasion
            coast: jacquard, bridesmaid
            ted baker: floral, bow detail
            phase eight: lace, tulle
            roman: printed, shift
            joules: tunic, jersey"""
        ),
        _words(
            "dress, maxi dress, midi dress, summer dress, party dress, wrap dress, "
            "evening dress, bodycon dress, shirt dress, jumper dress, gown, prom dress"
        ),
        [
            _COLOURS,
            _SIZES,
            _words("floral, polka dot, striped, sequin, lace, plain, leopard print, satin, velvet, denim"),
            _words("long sleeve, off shoulder, sleeveless, short sleeve, strapless, backless, v neck, high neck"),
            _words("plus size, petite, maternity, tall, womens, girls"),
        ],
        _words("wedding guest, party, summer, work, beach, prom, christmas, graduation"),
        _words("belt, jacket, slip, shapewear"),
        range(15, 250, 5),
    ),
    "Headphones": Shelf(
        _brands(
            """sony: wh-1000xm4, wf-1000xm3, wh-ch510, mdr-7506
            bose: quietcomfort 35, soundsport, 700
            apple: airpods, airpods pro, airpods max, earpods
            jbl: tune 500bt, free x, live 650
            sennheiser: hd 450bt, momentum 3, hd 599
            beats: solo 3, studio buds, powerbeats pro
            samsung: galaxy buds, galaxy buds live
            anker: soundcore life q20, liberty air
            skullcandy: crusher, indy
            audio-technica: ath-m50x
            jabra: elite 75t, evolve 65
            hyperx: cloud ii, cloud stinger"""
        ),
        _words("headphones, earbuds, wireless earbuds, gaming headset, earphones, headset, over ear headphones, neckband"),
        [
            _words("wireless, bluetooth, wired, true wireless"),
            _words("noise cancelling, with mic, bass, waterproof, foldable, surround sound"),
            _COLOURS,
            _words("over ear, in ear, on ear, bone conduction"),
            _words("refurbished, usb c, 3.5mm, long battery"),
        ],
        _words("running, gym, ps4, pc, kids, sleeping, iphone, swimming, xbox one, office"),
        _words("case, ear tips, cable, stand, replacement pads, adapter"),
        range(10, 400, 10),
    ),
    "Kitchen Appliances": Shelf(
        _brands(
            """bosch: serie 4, mum5, tassimo
            kenwood: chef, kmix, multipro
            kitchenaid: artisan, classic, mini
            philips: airfryer xl, lattego, viva
            ninja: foodi, af100, professional
            tefal: actifry, optigrill
            delonghi: dedica, magnifica, icona
            russell hobbs: inspire, luna, buckingham
            breville: vita, barista express
            morphy richards: accents, venture
            nespresso: vertuo, essenza
            smeg: retro 50s
            instant pot: duo, ultra
            prestige: deluxe, popular"""
        ),
        _words(
            "air fryer, kettle, toaster, blender, coffee machine, stand mixer, microwave, "
            "food processor, slow cooker, juicer, rice cooker, hand mixer, mixer grinder, pressure cooker, sandwich maker"
        ),
        [
            _COLOURS,
            _words("1.7l, 5l, 3l, 1.5l, 6l, 20l, 750w, 1000w, 2000w, 500w"),
            _words("stainless steel, glass, digital, cordless, 4 slice, 2 slice, retro, compact, 3 in 1"),
            _words("dual basket, with timer, programmable, self cleaning, low wattage"),
        ],
        _words("small kitchen, family, smoothies, baking, one person, caravan, soup"),
        _words("liners, recipe book, filter, spare parts, descaler, jar, bowl, pods"),
        range(20, 600, 20),
    ),
    "Refrigerators": Shelf(
        _brands(
            """samsung: family hub, rb7300, rs50, twin cooling
            lg: instaview, door in door, gsl561, linear cooling
            bosch: kgn34, kir81, serie 6 kan93
            beko: cfg1582, harvestfresh
            hotpoint: futura, h1nt
            liebherr: cnef, ik, sbses
            siemens: iq500, kg36
            aeg: santo, rcb
            smeg: fab28, fab32
            whirlpool: intellifresh, wqa
            hisense: rq560, rs694
            fridgemaster: muz, mc55"""
        ),
        _words(
            "fridge freezer, fridge, american fridge freezer, mini fridge, freezer, refrigerator, chest freezer, wine cooler, larder fridge"
        ),
        [
            _words("frost free, no frost, low frost, a+++, energy efficient, inverter"),
            _words("70/30, 50/50, 60/40, 200l, 300l, 500l, 55cm wide, 60cm wide, tall"),
            _words("white, silver, black, stainless steel, cream, red"),
            _words("integrated, freestanding, under counter, built in, double door, single door, side by side"),
            _words("with water dispenser, with ice maker, non plumbed, lockable"),
        ],
        _words("garage, bedroom, office, caravan, student room, drinks"),
        _words("shelf, thermometer, door seal, water filter, light bulb, drawer"),
        range(100, 2000, 50),
    ),
    "Cameras": Shelf(
        _brands(
            """canon: eos 2000d, eos r6, powershot g7x, eos 80d, eos m50
            nikon: d3500, z6, coolpix p900, d850, z50
            sony: alpha a7 iii, zv-1, rx100, a6000, hx60
            fujifilm: x-t30, instax mini 11, x100v, gfx 50s
            panasonic: lumix gh5, lumix tz90, fz82
            olympus: om-d e-m10, tough tg-6, pen
            gopro: hero 9, hero 8, max
            polaroid: now, snap
            leica: q2, m10, d-lux
            kodak: pixpro fz53, printomatic
            dji: osmo pocket, mavic mini"""
        ),
        _words(
            "camera, dslr camera, mirrorless camera, digital camera, "
            "instant camera, action camera, compact camera, bridge camera, vlogging camera"
        ),
        [
            _words("24mp, 20mp, 4k, 16mp, 45mp, full frame"),
            _words("18-55mm lens, body only, twin lens kit, with lens, 16-50mm, 24-105mm"),
            _words("black, silver, white, pink, blue"),
            _words("waterproof, wifi, refurbished, bluetooth, flip screen, used, night vision"),
        ],
        _words("beginners, kids, vlogging, wildlife, travel, underwater, youtube, sports"),
        _words("bag, tripod, memory card, battery, lens cap, strap, film, flash"),
        range(50, 2500, 50),
    ),
    "Toys": Shelf(
        _brands(
            """lego: star wars, city, technic, friends, harry potter, duplo, ninjago, creator
            barbie: dreamhouse, fashionista, camper
            hot wheels: track, monster truck, garage
            playmobil: pirates, horse stable, police
            nerf: elite, fortnite, rival
            fisher price: laugh and learn, little people
            vtech: toot toot, kidizoom, baby walker
            hasbro: monopoly, jenga, transformers
            paw patrol: lookout tower, ultimate rescue
            orchard toys: shopping list, bus stop
            ravensburger: disney, gravitrax
            sylvanian families: cottage, caravan"""
        ),
        _words(
            "toy, board game, puzzle, doll, building blocks, remote control car, "
            "soft toy, play kitchen, train set, scooter, teddy bear, water gun, action figure"
        ),
        [
            _words(
                "for 3 year old, for 5 year old, for 2 year old, "
                "for 4 year old, for 7 year old, for 1 year old, for 10 year old, for 8 year old"
            ),
            _words("wooden, electric, educational, large, mini, musical, magnetic, interactive"),
            _COLOURS,
            _words("boys, girls, baby, toddler"),
            _words("500 pieces, 1000 pieces, 100 pieces, set, bundle"),
        ],
        _words("christmas, birthday, garden, bath, travel, outdoors"),
        _words("storage box, batteries, table, display case, play mat"),
        range(5, 200, 5),
    ),
    "Furniture": Shelf(
        _brands(
            """ikea: billy, malm, kallax, hemnes, poang, ektorp
            vidaxl: rattan, solid acacia, poly
            dwell: cosmopolitan, harrison
            habitat: radius, kota
            silentnight: mirapocket, essentials
            songmics: vasagle, lift top
            julian bowen: coxmoor, amsterdam
            birlea: chicago, corona
            homcom: mobile, l shaped
            argos home: bournemouth, nordic"""
        ),
        _words(
            "sofa, bed frame, desk, wardrobe, dining table, office chair, bookcase, coffee table, "
            "chest of drawers, mattress, tv unit, bedside table, corner sofa, bar stools, armchair"
        ),
        [
            _words("oak, white, grey, black, walnut, pine, cream, green velvet, brown leather, navy blue"),
            _words("double, king size, single, 2 seater, 3 seater, 4 seater, 6 seater, small double, extending"),
            _words("fabric, leather, solid wood, metal, glass, rattan, velvet, high gloss"),
            _words("with storage, folding, corner, adjustable, ergonomic, round, mirrored, modern, vintage"),
        ],
        _words("small spaces, bedroom, garden, kids room, home office, hallway, living room"),
        _words("covers, legs, cushions, handles, assembly service, protector"),
        range(50, 1500, 50),
    ),
    "Beauty": Shelf(
        _brands(
            """loreal: elvive, true match, revitalift, infallible
            maybelline: fit me, sky high, superstay
            mac: studio fix, ruby woo, strobe cream
            the ordinary: niacinamide, hyaluronic acid, retinol
            nivea: soft, q10, men
            olay: regenerist, total effects
            clinique: moisture surge, happy, even better
            estee lauder: double wear, advanced night repair
            garnier: micellar, nutrisse, ambre solaire
            cerave: moisturising, hydrating, sa smoothing
            dior: sauvage, miss dior, lip glow
            chanel: no 5, bleu, coco mademoiselle"""
        ),
        _words(
            "foundation, mascara, moisturiser, perfume, lipstick, shampoo, face wash, serum, "
            "hair dye, sunscreen, aftershave, nail polish, concealer, conditioner, eyeshadow palette"
        ),
        [
            _words("50ml, 100ml, 30ml, 200ml, 400ml, 15ml, gift set, travel size"),
            _words("matte, waterproof, vegan, fragrance free, spf 50, spf 30, organic, long lasting"),
            _words("ivory, nude, beige, red, natural beige, blonde, brown, black, pink, warm sand"),
            _words("mens, womens, unisex, teenage"),
        ],
        _words("dry skin, oily skin, sensitive skin, curly hair, acne, mature skin, dark circles, damaged hair"),
        _words("brush set, sponge, remover, refill, bag, mirror"),
        range(5, 120, 5),
    ),
}
